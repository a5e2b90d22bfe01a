"""Sizes and hashes of files, kept beside them: what was damaged since is found before it is read."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from raylign.files import publish_text

MANIFEST_NAME = "manifest.json"
Fingerprint = Mapping[str, int | str]
"""`size` in bytes and `sha256` (hex) of one file."""


def fingerprint(path: Path) -> Fingerprint:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, Fingerprint]:
    """Of the files `names` of `folder`."""
    return {name: fingerprint(folder / name) for name in names}


def damage(folder: Path, expected: Mapping[str, Fingerprint]) -> str:
    """What is wrong with the first file of `folder` that is not as `expected`; "" when all are."""
    for name, wanted in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != wanted["size"]:
            return f"{name} has {size} bytes, not {wanted['size']}"
        if fingerprint(path)["sha256"] != wanted["sha256"]:
            return f"{name} is not what was written: its sha256 differs"
    return ""


def seal(folder: Path) -> None:
    """Write the manifest of every file now below `folder` into it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = fingerprints(folder, (name for name in names if name != MANIFEST_NAME))
    publish_text(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=1))


def sealed_damage(folder: Path) -> str:
    """What is wrong with a sealed folder; "" when it is whole."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_NAME} cannot be read"
    return damage(folder, files)
