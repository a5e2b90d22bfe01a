"""The layout is part of the contract: where code lives, what it may import, how long it may grow."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import LONG, SHARING

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("platform", "actors", "recipes")
OURS = ("raylign", "actors", "recipes")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MIN_FILE_LINES = 40
SMALL = {
    "actors.generator.preloaded": "imported by another process, for what it imports",
    "raylign.data.formats.hh": "each published format has a file of its name",
    "raylign.losses.function": "each family of losses has a file",
    "recipes.commands.resume": "each command has a file",
    "raylign.scoring.vader": "an example that users name and copy",
}
"""Files that are short though one module alone imports them, and why they stand alone."""
LOOSE = {"__init__.py", "chunks.py", "errors.py", "records.py", "roles.py"}
"""All that may stand beside the folders of the library."""
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "actors",
    "deploy",
    "platform",
    "pyproject.toml",
    "recipes",
    "tests",
}


def sources(folder: str) -> list[Path]:
    """Every Python file below a top-level folder, in a stable order."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python file below {folder}/"
    return found


def imported_packages(source: str) -> set[str]:
    """Top-level names of the absolute imports of a module, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module.split(".")[0])
    return names


def modules_at_start(module: str) -> set[str]:
    """What importing `module` imports before any function is called: ours by full name, others by package.

    Imports for type checkers alone are left out.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if (path := _file_of(name)) is not None:
            waiting += [name.rpartition(".")[0]] if "." in name else []
            waiting += _imports_at_start(ast.parse(path.read_text()).body)
    return found


def _file_of(module: str) -> Path | None:
    root = ROOT / "platform" if module.split(".")[0] == "raylign" else ROOT
    path = root / module.replace(".", "/")
    places = (path.with_suffix(".py"), path / "__init__.py")
    return next((place for place in places if place.is_file() and module.split(".")[0] in OURS), None)


def _imports_at_start(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.Import():
                yield from (alias.name.split(".")[0] for alias in node.names)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in OURS:
                yield module
                yield from (name for alias in node.names if _file_of(name := f"{module}.{alias.name}"))
            case ast.ImportFrom(module=str(module)):
                yield module.split(".")[0]
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from _imports_at_start(node.orelse)
            case ast.If() | ast.Try() | ast.With() | ast.ClassDef():
                yield from _imports_at_start([*node.body, *getattr(node, "orelse", ())])


def long_functions(source: str, limit: int) -> list[tuple[str, int]]:
    """Name and length in lines of each function longer than the limit, methods and inner functions included."""
    lengths = [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [(name, lines) for name, lines in lengths if lines > limit]


def run_python(code: str, *search_path: Path) -> str:
    """What a child Python prints, started in the repository root with this PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search_path))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def readers() -> dict[str, set[str]]:
    """By module of ours: the modules of ours that import it, in whatever function."""
    paths = {_name_of(path): path for folder in SOURCE_FOLDERS for path in sources(folder)}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for module in wanted:
                if module in found:
                    found[module].add(name)
    return found


def _name_of(path: Path) -> str:
    root = ROOT / "platform" if path.is_relative_to(ROOT / "platform") else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.rstrip("\0").split("\0")


def test_platform_holds_only_the_package() -> None:
    modules = [p.name for p in (ROOT / "platform").iterdir() if p.suffix in {".py", ".pyc", ".so"}]
    assert modules == [], (
        f"{modules} directly in platform/ shadow the standard library; move them into platform/raylign"
    )


def test_the_standard_library_platform_wins_in_a_child_process() -> None:
    assert run_python("import platform; print(platform.system())", ROOT, ROOT / "platform") == os.uname().sysname


def test_imported_packages_sees_every_form_of_import() -> None:
    source = "import a.b as c\nfrom d.e import f\nfrom . import g\ndef h():\n    import i\n"
    assert imported_packages(source) == {"a", "d", "i"}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("platform/raylign", {"ray", "vllm", "deepspeed", "actors", "recipes"}), ("actors", {"recipes"})],
)
def test_imports_go_one_way(folder: str, forbidden: set[str]) -> None:
    broken = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in sources(folder)
        if (names := imported_packages(path.read_text()) & forbidden)
    }
    assert broken == {}, f"recipes -> actors -> raylign, never backwards: {broken}"


def test_the_configuration_loads_without_the_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "ray", "vllm", "deepspeed", "mlflow", "datasets")
    code = f"import sys, raylign.config; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code, ROOT / "platform") == "[]"


@pytest.mark.parametrize("module", [f"recipes.{name}" for name in ("online_dpo", "offline_dpo", "sft", "reward_model")])
def test_a_driver_starts_without_engines(module: str) -> None:
    """They take half a minute of CPU time here; the actors import them on their nodes. A plan needs no Ray either."""
    imported = modules_at_start(module)
    assert {"recipes.opening", "transformers"} <= imported
    assert not imported & {"torch", "vllm", "deepspeed", "peft", "bitsandbytes", "ray", "mlflow", "matplotlib"}


def test_a_team_is_named_without_engines() -> None:
    imported = modules_at_start("actors.team")
    assert {"actors.trainer.group", "ray"} <= imported
    assert not imported & {"torch", "vllm", "deepspeed", "peft", "bitsandbytes", "mlflow"}


@pytest.mark.parametrize(
    "module",
    ["actors.generator.engine_process", "actors.generator.actor", "actors.trainer.actor", "actors.scorer.actor"],
)
def test_an_actor_begins_without_its_libraries(module: str) -> None:
    """Ray loads this before a line of ours runs: what is imported here is not imported beside anything else."""
    imported = modules_at_start(module)
    assert "raylign.roles" in imported
    assert not imported & {"torch", "transformers", "vllm", "deepspeed", "peft", "scipy", "datasets", "mlflow"}


def test_actors_import_their_engines_where_they_start() -> None:
    assert "vllm" in modules_at_start("actors.generator.engine")
    assert "deepspeed" in modules_at_start("actors.trainer.rank")
    assert not modules_at_start("actors.trainer.rank") & {"vllm", "peft"}


def test_long_functions_counts_from_def_to_last_line() -> None:
    assert long_functions("def f():\n    a = 1\n    return a\n", limit=2) == [("f", 3)]
    assert long_functions("def f():\n    a = 1\n    return a\n", limit=3) == []


def test_what_one_module_reads_alone_is_no_file_of_its_own() -> None:
    found = readers()
    small = {
        name
        for folder in SOURCE_FOLDERS
        for path in sources(folder)
        if path.name != "__init__.py"
        and len(path.read_text().splitlines()) < MIN_FILE_LINES
        and len(found[name := _name_of(path)]) <= 1
    }
    assert small == SMALL.keys(), "a file of few lines that one caller reads belongs to that caller, or needs a reason"


def test_the_library_is_a_few_folders() -> None:
    assert {path.name for path in (ROOT / "platform/raylign").glob("*.py")} == LOOSE


@pytest.mark.parametrize("folder", SOURCE_FOLDERS)
def test_files_and_functions_stay_short(folder: str) -> None:
    too_long = []
    for path in sources(folder):
        source, name = path.read_text(), path.relative_to(ROOT)
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            too_long.append(f"{name}: {lines} lines, limit {MAX_FILE_LINES}")
        for function, count in long_functions(source, MAX_FUNCTION_LINES):
            too_long.append(f"{name}: {function} has {count} lines, limit {MAX_FUNCTION_LINES}")
    assert too_long == []


def test_the_top_level_holds_nothing_else() -> None:
    extra = {name.split("/")[0] for name in tracked_files()} - TOP_LEVEL
    assert extra == set(), f"tracked at the top level: {sorted(extra)}; move them into one of {sorted(TOP_LEVEL)}"


def test_no_weights_and_no_run_output_is_tracked() -> None:
    unwanted = [
        name
        for name in map(Path, tracked_files())
        if name.suffix in {".safetensors", ".gguf"} or name.name.startswith("mlflow.db") or "runs" in name.parts
    ]
    assert unwanted == []


def test_the_order_of_tests_knows_the_files_that_share_processes() -> None:
    """The last of them ends with what no other test can go on with."""
    files = {path.name: path.read_text() for path in (ROOT / "tests/integration").glob("test_*.py")}
    asked = ("ranks: Processes", "lent: dict", 'usefixtures("lent")', "engines: Engines")
    sharing = {f"integration/{name}" for name, text in files.items() if any(fixture in text for fixture in asked)}
    assert sharing == set(SHARING)
    assert "ranks.end(" in files[SHARING[-1].removeprefix("integration/")]
    assert all((ROOT / "tests" / name).is_file() for name in LONG)
