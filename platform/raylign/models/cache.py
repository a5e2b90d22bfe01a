"""Folders under the cache root that are made once, appear whole, and are checked byte for byte on every use."""

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from raylign.errors import ModelError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK_TIMEOUT_S = 600.0


class FileFacts(BaseModel):
    """Size in bytes and sha256 (hex) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class CacheManifest(BaseModel):
    """What a cached folder holds and what it was made from: `source` is free text facts, `files` runs by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: dict[str, str]
    files: dict[str, FileFacts]


def cache_root() -> Path:
    """`$RAYLIGN_CACHE`, else `~/.cache/raylign`."""
    named = os.environ.get("RAYLIGN_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "raylign"


def cached_folder(name: str, source: dict[str, str], build: Callable[[Path], None]) -> Path:
    """The folder `models/<name>` of the cache, built by `build(empty folder)` when it is missing or damaged.

    `source` says what it is made from; a folder made from something else is rebuilt. Safe with concurrent callers on
    one machine or shared storage. Raises ModelError when the cache cannot be written; errors of `build` pass through.
    """
    folder = cache_root() / "models" / name
    try:
        if not folder_fault(folder, source):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock"), timeout=LOCK_TIMEOUT_S):
            _rebuild_unless_whole(folder, source, build)
    except Timeout as error:
        raise ModelError(
            f"{error.lock_file}: another process has held this lock for {LOCK_TIMEOUT_S:g} s; end that process, "
            "or set RAYLIGN_CACHE to another folder"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot use the model cache ({error}); free disk space, or set RAYLIGN_CACHE to a folder "
            "that this user can read and write"
        ) from error
    return folder


def folder_fault(folder: Path, source: dict[str, str]) -> str:
    """What is wrong with a cached folder, naming the file; empty when every byte is as its manifest says."""
    try:
        manifest = CacheManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValidationError:
        return f"{MANIFEST} is not a manifest"
    if manifest.source != source:
        return f"{MANIFEST} names another source"
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST and file.name not in manifest.files:
            return f"{file.name} is not in {MANIFEST}"
    faults = (_file_fault(folder / name, facts) for name, facts in manifest.files.items())
    return next((fault for fault in faults if fault), "")


def _file_fault(file: Path, facts: FileFacts) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    if (size := file.stat().st_size) != facts.size:
        return f"{file.name} has {size} bytes instead of {facts.size}"
    return "" if sha256_of(file) == facts.sha256 else f"{file.name} has another sha256 than {MANIFEST}"


def sha256_of(file: Path) -> str:
    """The sha256 of a file, hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rebuild_unless_whole(folder: Path, source: dict[str, str], build: Callable[[Path], None]) -> None:
    """Runs under the lock, so a staging folder seen here was left by a killed process."""
    fault = folder_fault(folder, source)
    if not fault:
        return
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(stale)
    if folder.exists():
        log.warning("rebuilding %s: %s", folder, fault)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    staging.mkdir()
    try:
        build(staging)
        _seal(staging, source)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _seal(staging: Path, source: dict[str, str]) -> None:
    built = sorted(staging.iterdir())
    files = {file.name: FileFacts(size=file.stat().st_size, sha256=sha256_of(file)) for file in built}
    manifest = CacheManifest(source=source, files=files)
    (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for file in (*built, staging / MANIFEST):
        file.chmod(0o644)
        _sync(file)
    _sync(staging)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
