"""YAML and dotted overrides in, a checked RunConfig out, and back."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raylign.config.tree import RunConfig
from raylign.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `block.key=value` overrides. Raises ConfigError naming each wrong key."""
    return parse_config(_read_yaml(path), overrides, where=str(path))


def parse_config(raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> RunConfig:
    """Check a raw mapping after overrides. Raises ConfigError naming each wrong key."""
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_describe(detail)}" for detail in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the recipe ({error.strerror}); give the path of a .yaml file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; give the path of a .yaml recipe") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of blocks, not a {type(raw).__name__}")
    return raw


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form block.key=value")
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: value is not valid YAML") from error


def _describe(detail: ErrorDetails) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{location}: unknown key; {hint}"
    if detail["type"] == "value_error":
        # Rules of ours name the value themselves, without what must stay secret.
        message = detail["msg"].removeprefix("Value error, ")
        return f"{location}: {message}" if location else message
    return f"{location}: {detail['msg']} (got {detail['input']!r})"


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Field names of the block at `location`."""
    block: type[BaseModel] = RunConfig
    for part in location:
        field = block.model_fields.get(str(part))
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        blocks = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not blocks:
            continue
        block = blocks[0]
    return list(block.model_fields)
