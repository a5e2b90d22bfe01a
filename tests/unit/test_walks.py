"""platform/README.md names files and what is in them: all of it is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "platform/README.md").read_text()
STEPS = re.findall(r"^- `([\w/]+\.py)`: (.*)$", PAGE, re.MULTILINE)


def names_in(path: Path) -> set[str]:
    """What the file defines or imports, in classes and functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
    return found


def test_there_are_walks() -> None:
    assert len(STEPS) > 30


@pytest.mark.parametrize(("file", "told"), STEPS)
def test_every_name_of_a_walk_exists(file: str, told: str) -> None:
    wanted = {name for name in re.findall(r"`([A-Za-z_]\w*)`", told)}
    assert wanted <= names_in(ROOT / file), f"{file} has no {wanted - names_in(ROOT / file)}"


def test_every_other_path_exists() -> None:
    table = PAGE[PAGE.index("## What to touch") :]
    for name in re.findall(r"`((?:config|losses|scoring|pairing)/[\w/]*(?:\.py)?)`", table):
        assert (ROOT / "platform/raylign" / name).exists(), name
    for name in re.findall(r"`((?:actors|tests)/[\w/]*\.py)`", PAGE):
        assert (ROOT / name).is_file(), name
