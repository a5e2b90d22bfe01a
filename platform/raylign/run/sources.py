"""Source files of code that a recipe names as `module:name`: found without running any of it."""

import ast
import hashlib
import importlib.util
import os
import shutil
import site
import socket
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylign.boundary.code import trust_kept
from raylign.errors import RaylignError
from raylign.run.files import disk_errors, publish_folder

CODE = "code"
"""Folder of a run directory with the code that its functions had when it began."""
OURS = frozenset({"raylign", "actors", "recipes"})
"""Packages that every node has."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: `name` is its file's place below the folder that imports search, `path` where it is here."""

    name: str
    path: Path
    content: bytes


@dataclass(frozen=True, slots=True)
class ModuleSources:
    """A module and all modules of the same project that it imports, in whatever function, and those that these do.

    Made by `module_sources`. `files` has the module itself first, and nothing where it was not found. Of a module that
    is installed (`is_installed`), or one of ours, it is the only one: what that imports is installed with it.
    """

    files: tuple[SourceFile, ...]
    is_installed: bool

    @property
    def digest(self) -> str:
        """sha256 (hex) over the names and contents of the files; "" where there are none."""
        total = hashlib.sha256()
        for file in sorted(self.files, key=lambda file: file.name):
            total.update(f"{file.name} {hashlib.sha256(file.content).hexdigest()}\n".encode())
        return total.hexdigest() if self.files else ""

    def kept(self, parent: Path) -> "KeptSources":
        """Copy the files into a folder of `parent` that is named after their digest, unless they are installed.

        Raises DiskError.
        """
        if self.is_installed:
            return KeptSources("", self.digest)
        folder = parent / self.digest[:16]
        with disk_errors(folder):
            if not all(_has(folder / file.name, file.content) for file in self.files):
                shutil.rmtree(folder, ignore_errors=True)
                staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
                for file in self.files:
                    target = staging / file.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.content)
                publish_folder(staging, folder)
        return KeptSources(str(folder), self.digest)


@dataclass(frozen=True, slots=True)
class KeptSources:
    """Where the sources of a module are kept, in a run directory that every node sees, and their digest.

    `folder` is "" for a module that is installed. Made on the driver, read by the process that runs the code, on
    whatever node.
    """

    folder: str
    digest: str

    def make_importable(self, spec: str) -> bool:
        """Let imports of this process, and of its children, find just these sources of `module:name`.

        Where the same ones are found anyway they stay in their place, beside whatever files they read. False where
        others are found all the same: of a module that is installed, or where the folder cannot be seen from here.
        """
        if module_sources(spec).digest == self.digest:
            return True
        if not self.folder:
            return False
        sys.path.insert(0, self.folder)
        trust_kept(Path(self.folder))
        return module_sources(spec).digest == self.digest


def kept_code(specs: Iterable[str], folder: Path) -> dict[str, KeptSources]:
    """The code behind each `module:name`, with a copy below `folder`. Raises DiskError."""
    found = {spec: module_sources(spec) for spec in sorted(set(specs))}
    # What is not found is told better by who loads it.
    return {spec: sources.kept(folder) for spec, sources in found.items() if sources.files}


def take_code(code: Mapping[str, KeptSources], option: str, error: type[RaylignError]) -> None:
    """Let imports of this process find the code that the run began with. Raises `error` where another one is found."""
    for spec, kept in code.items():
        if not kept.make_importable(spec):
            shared = f", or put run.dir on storage that every node sees ({kept.folder})" if kept.folder else ""
            raise error(
                f"{option}={spec}: {socket.gethostname()} has other code for it than the run began with; "
                f"install the same version of it on every node{shared}"
            )


def module_sources(spec: str) -> ModuleSources:
    """Of `module:name`, as this process would import it, or its child in the working directory."""
    search = [entry or os.getcwd() for entry in (*sys.path, os.getcwd())]
    root, installed = spec.partition(":")[0], _installed_folders()
    found: dict[str, SourceFile] = {}
    first = _find(root, search)
    if first is None:
        return ModuleSources((), is_installed=False)
    if _is_installed(root, first, installed):
        return ModuleSources((_source(root, first),), is_installed=True)
    waiting = [root]
    while waiting:
        module = waiting.pop(0)
        path = _find(module, search)
        if module in found or path is None or _is_installed(module, path, installed):
            continue
        found[module] = _source(module, path)
        waiting += _packages(module)
        waiting += _imported(found[module].content, module, is_package=path.name == "__init__.py")
    return ModuleSources(tuple(found.values()), is_installed=False)


def _has(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _source(module: str, path: Path) -> SourceFile:
    place = module.replace(".", "/")
    return SourceFile(f"{place}/__init__.py" if path.name == "__init__.py" else f"{place}.py", path, path.read_bytes())


def _find(module: str, search: Sequence[str]) -> Path | None:
    """The file of a module, without the imports of the packages around it that importlib would do."""
    parts = module.split(".")
    for folder in (*map(Path, search), *_by_finders(parts[0])):
        place = folder.joinpath(*parts)
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file.resolve()
    return None


def _by_finders(top: str) -> Iterator[Path]:
    """Folders with the top-level module that finders know of, as of packages that are installed as editable."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is not None:
        yield from (Path(place).parent for place in spec.submodule_search_locations or ())
        if spec.has_location and spec.origin and spec.submodule_search_locations is None:
            yield Path(spec.origin).parent


def _installed_folders() -> tuple[Path, ...]:
    names = ("purelib", "platlib", "stdlib", "platstdlib")
    folders = [*site.getsitepackages(), site.getusersitepackages(), *(sysconfig.get_path(name) for name in names)]
    return tuple(dict.fromkeys(Path(folder).resolve() for folder in folders))


def _is_installed(module: str, path: Path, installed: Sequence[Path]) -> bool:
    return module.partition(".")[0] in OURS or any(path.is_relative_to(folder) for folder in installed)


def _packages(module: str) -> list[str]:
    """The packages around a module."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _imported(content: bytes, module: str, *, is_package: bool) -> list[str]:
    """Names that may be modules, of every import in the source, wherever in it; [] where it is no Python."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names: list[str] = []
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
    return names


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that a `from` names; "" where it leads out of the package."""
    if not node.level:
        return node.module or ""
    try:
        return importlib.util.resolve_name(f"{'.' * node.level}{node.module or ''}", package)
    except ImportError:
        return ""
