"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def publish_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then fsync it and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def publish_text(path: Path, text: str) -> None:
    """`text` as UTF-8 in `path`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    publish_file(path, write)


def publish_folder(staging: Path, folder: Path) -> None:
    """Fsync every file of `staging`, then rename it to `folder`, which must not exist."""
    for path in (*staging.rglob("*"), staging):
        _sync(path)
    staging.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
