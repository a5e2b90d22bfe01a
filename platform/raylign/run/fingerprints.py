"""Sizes and hashes of files, kept beside them: what was damaged since is found before it is read."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from raylign.errors import RecordError
from raylign.run.files import publish_text, read_record

MANIFEST_NAME = "manifest.json"
_DECISIVE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model's folder that decide what it says of a text: weights, config, tokenizer, template, code."""
_THREADS = 8
_READ = frozenset({".json", ".safetensors"})
"""Files that readers of a folder look for by their ending."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`size` in bytes and `sha256` (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SealedFiles:
    """The files of a sealed folder, by their path in it. Made by `seal`, read by `sealed_damage`."""

    files: Mapping[str, Fingerprint]


_MANIFEST = TypeAdapter(SealedFiles)


def fingerprint(path: Path) -> Fingerprint:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Fingerprint(path.stat().st_size, digest)


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, Fingerprint]:
    """Of the files `names` of `folder`."""
    return {name: fingerprint(folder / name) for name in names}


def model_files(folder: Path) -> list[tuple[str, str]]:
    """Name and sha256 (hex) of the files of a model's folder that decide what it says; it reads every byte of them."""
    files = sorted({file for pattern in _DECISIVE for file in folder.glob(pattern)})
    # Of large files the hash is computed without Python's lock.
    with ThreadPoolExecutor(_THREADS) as threads:
        return [(file.name, one.sha256) for file, one in zip(files, threads.map(fingerprint, files), strict=True)]


def model_digest(*folders: Path) -> str:
    """sha256 (hex) over `model_files` of the folders that make a model, such as an adapter's behind its base's."""
    total = hashlib.sha256()
    for folder in folders:
        for name, own in model_files(folder):
            total.update(f"{name} {own}\n".encode())
        total.update(b"\n")
    return total.hexdigest()


def damage(folder: Path, expected: Mapping[str, Fingerprint]) -> str:
    """What is wrong with the first file of `folder` that is not as `expected`; "" when all are."""
    for name, wanted in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != wanted.size:
                return f"{name} has {size} bytes, not {wanted.size}"
            if fingerprint(path).sha256 != wanted.sha256:
                return f"{name} is not what was written: its sha256 differs"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return ""


def seal(folder: Path) -> None:
    """Write the manifest of every file now below `folder` into it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = fingerprints(folder, (name for name in names if name != MANIFEST_NAME))
    publish_text(folder / MANIFEST_NAME, json.dumps(asdict(SealedFiles(files)), indent=1))


def sealed_damage(folder: Path, *, below: bool = True) -> str:
    """What is wrong with a sealed folder; "" when it is whole. Without `below` its subfolders are not looked at."""
    if not os.path.isdir(folder):
        return "it is no folder"
    try:
        if not (folder / MANIFEST_NAME).exists():
            return f"it has no {MANIFEST_NAME}"
        files = read_record(folder / MANIFEST_NAME, _MANIFEST).files
        added = [path.name for path in folder.iterdir() if path.suffix in _READ and path.name not in files]
    except RecordError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if unknown := sorted({*added} - {MANIFEST_NAME}):
        return f"{unknown[0]} was added: it is not in {MANIFEST_NAME}"
    return damage(folder, files if below else {name: own for name, own in files.items() if "/" not in name})
