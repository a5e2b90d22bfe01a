"""From `module:function` to the function. Only the scoring process does this: user code is never imported elsewhere."""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

from raylign.boundary.code import is_inside
from raylign.errors import ScorerError

ScoringFunction = Callable[..., object]


def resolve(spec: str) -> ScoringFunction:
    """Import and return `module:function`. Raises ScorerError, or whatever the module's own code raises."""
    module_name, name = spec_parts(spec)
    module = _import(module_name)
    if name not in dir(module):
        raise ScorerError(f"module {module_name!r} has no {name!r}{closest(name, _callables(module))}")
    function: ScoringFunction = getattr(module, name)
    if not callable(function):
        raise ScorerError(f"{name!r} is a {type(function).__name__}, not a function{closest(name, _callables(module))}")
    return function


def source_of(spec: str, function: ScoringFunction) -> tuple[str, int]:
    """File and line where the function is defined; the module's file and line 1 for callables without source."""
    try:
        plain = inspect.unwrap(function)
        return inspect.getfile(plain), inspect.getsourcelines(plain)[1]
    except (OSError, TypeError):
        module = importlib.import_module(spec.partition(":")[0])
        return module.__file__ or "", 1


def require_inside(spec: str, roots: Sequence[Path]) -> None:
    """Raise ScorerError when the module, or a package around it, is a file outside `roots`. Runs nothing outside."""
    parts = spec_parts(spec)[0].split(".")
    for count in range(1, len(parts) + 1):
        try:
            # Imports the packages around it, which have passed.
            found = importlib.util.find_spec(".".join(parts[:count]))
        except ModuleNotFoundError:
            return
        if found is None:
            return
        if found.has_location and found.origin:
            require_file_inside(found.origin, roots)


def require_file_inside(file: str, roots: Sequence[Path]) -> None:
    """Raise ScorerError when `file` is outside `roots`. The first of them is the project."""
    if not is_inside(file, roots):
        raise ScorerError(
            f"{Path(file).resolve()} is outside the project ({roots[0]}) and no installed package; move it there, "
            "install it, or, if you trust it, set scoring.allow_outside=true"
        )


def spec_parts(spec: str) -> tuple[str, str]:
    """Module and name of `module:function`. Raises ScorerError."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ScorerError("it is not of the form module:function; give it so, as in my_scores:score")
    return module, name


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):
            raise ScorerError(f"module {name!r} needs {missing!r}, which is not installed; install it") from error
        raise ScorerError(
            f"no module {missing!r} on PYTHONPATH or in the working directory{closest(missing, _siblings(missing))}"
        ) from error


def _siblings(missing: str) -> list[str]:
    """Full names of the modules that stand where `missing` was looked for."""
    parent, _, _ = missing.rpartition(".")
    if not parent:
        return [module.name for module in pkgutil.iter_modules()]
    package = importlib.import_module(parent)
    paths = package.__path__ if "__path__" in vars(package) else []
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(paths)]


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the general cure when no name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; correct the name"
