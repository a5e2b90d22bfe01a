"""What the command line asks of a recipe. One of somebody else's answers the same: `recipe: my_module:RECIPE`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from raylign.boundary.beside import is_torch_beside
from raylign.boundary.imports import lean_imports
from raylign.config import RECIPES, RunConfig, import_recipe
from raylign.export.card import Method

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, slots=True)
class Recipe(Generic[C]):
    """A script names its own at its end, as `RECIPE`."""

    config: type[C]
    """The tree of its settings."""
    main: Callable[[C], Path]
    """Run it, or go on with its run; returns the run directory."""
    plan: Callable[[C, Console], None]
    """Show what it would run, starting nothing. Raises RaylignError when it could not run."""
    method: Callable[[C], Method]
    """How model cards tell of it."""


def recipe_of(config: RunConfig) -> Recipe[Any]:
    """The recipe that `config` is of. Raises ConfigError when it cannot be loaded."""
    if config.recipe not in RECIPES:
        own: Recipe[Any] = import_recipe(config.recipe)
        return own
    # Code that comes with a model may be of both kinds: what reads a config, and what computes.
    without_torch = is_torch_beside() and not (config.scores_by_model or config.model.trust_remote_code)
    with lean_imports(*(["torch"] if without_torch else [])):
        found: Recipe[Any] = import_module(f"recipes.{config.recipe}").RECIPE
    return found
