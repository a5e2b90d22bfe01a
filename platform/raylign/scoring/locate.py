"""Where `module:function` stands, found by reading: whoever plans or exports somebody's run runs none of their code."""

import ast
import hashlib
import importlib.machinery
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylign.boundary.code import trusted_roots
from raylign.errors import ScorerError
from raylign.reading.files import open_plain
from raylign.report.text import one_line
from raylign.scoring.resolve import closest, require_file_inside, spec_parts

_HOPS = 8
_LONGEST_NAME, _SHOWN = 300, 60
_LONGEST = 4 << 20
"""Bytes of a module."""


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """Where a scoring function comes from. `sha256` is of the whole `file`; `line` counts from 1."""

    file: Path
    sha256: str
    line: int


def locate_function(spec: str, *, allow_outside: bool = False, option: str = "scoring.function") -> FunctionInfo:
    """Find `module:function` as an import would, without one.

    Raises ScorerError: no such module or name, a value that is no function, source that is no Python, and unless
    `allow_outside` code outside the working directory and the installed packages.
    """
    if len(spec) > _LONGEST_NAME:
        raise ScorerError(
            f"{option}={one_line(spec, _SHOWN)} is longer than {_LONGEST_NAME} characters; correct the name"
        )
    roots = () if allow_outside else trusted_roots(Path.cwd())
    try:
        module, name = spec_parts(spec)
        file, line, source = _defined(module, name, roots, _HOPS)
    except ScorerError as error:
        raise ScorerError(f"{option}={spec} cannot be loaded: {error}") from error
    return FunctionInfo(file, hashlib.sha256(source).hexdigest(), line)


def _defined(module: str, name: str, roots: Sequence[Path], hops: int) -> tuple[Path, int, bytes]:
    """File, line and source of where a name of a module is defined; of the module where only running it would tell."""
    file, is_package = _file_of(module, roots)
    if file.suffix != ".py":
        return file, 1, file.read_bytes()
    source, tree = _parsed(file)
    if name in (found := dict(_names(tree.body))):
        node = found[name]
        _require_callable(name, node, found)
        if isinstance(node, ast.ImportFrom) and hops:
            there, original = _imported(node, name, module, is_package)
            return _defined(there, original, roots, hops - 1)
        return file, node.lineno, source
    if "*" in found or "__getattr__" in found:
        return file, 1, source
    callables = [known for known, node in found.items() if not known.startswith("_") and not _is_value(node)]
    raise ScorerError(f"module {module!r} has no {name!r}{closest(name, callables)}")


def _file_of(module: str, roots: Sequence[Path]) -> tuple[Path, bool]:
    """The file of a module, and whether that is a package's. Every package around it must be inside `roots` too."""
    places: Sequence[str] | None = [*(entry or os.getcwd() for entry in sys.path), os.getcwd()]
    parts = module.split(".")
    found: importlib.machinery.ModuleSpec | None = None
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        found = _find(name, places)
        if found is None:
            prefix = name.removesuffix(parts[count - 1])
            known = [f"{prefix}{one.name}" for one in pkgutil.iter_modules(None if places is None else list(places))]
            raise ScorerError(f"no module {name!r} on PYTHONPATH or in the working directory{closest(name, known)}")
        if found.has_location and found.origin and roots:
            require_file_inside(found.origin, roots)
        places = found.submodule_search_locations
        if places is None and count < len(parts):
            raise ScorerError(f"no module {'.'.join(parts[: count + 1])!r}: {name} is no package; correct the name")
    if found is None or not (found.has_location and found.origin):
        raise ScorerError(f"module {module!r} has no source file to show; wrap the function in one of your own module")
    return Path(found.origin), found.submodule_search_locations is not None


def _find(name: str, places: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    found = importlib.machinery.PathFinder.find_spec(name, None if places is None else list(places))
    if found is not None:
        return found
    # Editable installs bring finders of their own.
    specs = (finder.find_spec(name, places) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def _parsed(file: Path) -> tuple[bytes, ast.Module]:
    try:
        with open_plain(file) as stream:
            source = stream.read(_LONGEST + 1)
        if len(source) > _LONGEST:
            raise ScorerError(f"{file} is longer than {_LONGEST >> 20} MiB; name a smaller module")
        return source, ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ScorerError(f"{file} is no Python that can be read ({error}); correct it") from error


def _names(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, those inside `if`, `try` and `with` too; "*" stands for all of another module."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import():
                yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
            case ast.ImportFrom():
                yield from ((alias.asname or alias.name, node) for alias in node.names)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (
                    (part.id, node) for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
                )
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                for field in ("body", "orelse", "finalbody"):
                    yield from _names(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    yield from _names(handler.body)


def _require_callable(name: str, node: ast.stmt, found: dict[str, ast.stmt]) -> None:
    if _is_value(node):
        assert isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
        callables = [known for known, other in found.items() if not known.startswith("_") and not _is_value(other)]
        kind = type(node.value.value).__name__
        raise ScorerError(f"{name!r} is a {kind}, not a function{closest(name, callables)}")


def _is_value(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)


def _imported(node: ast.ImportFrom, name: str, module: str, is_package: bool) -> tuple[str, str]:
    """Module and name that `from ... import ...` takes `name` from."""
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    if not node.level:
        return node.module or "", original
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])]), original
