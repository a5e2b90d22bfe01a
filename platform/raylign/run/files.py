"""Files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raylign.errors import DiskError, RaylignError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def disk_errors(path: Path, option: str = "run.dir") -> Iterator[None]:
    """What the disk refuses inside becomes a DiskError that names `path` and the cure; `option` sets the folder."""
    try:
        yield
    except OSError as error:
        cure = "free some space" if error.errno in _FULL else f"make it writable, or set {option} to another folder"
        raise DiskError(
            f"{path} cannot be written: {error.strerror or error}; {cure}, then run the same command again. "
            "What was finished before is safe"
        ) from error


def inside(run_dir: Path, relative: str) -> Path:
    """`relative` as a path under `run_dir`, links followed. Raises RaylignError when it leads outside."""
    try:
        path = (run_dir / relative).resolve()
        path.exists()
    except (OSError, ValueError) as error:
        raise RaylignError(f"artifact {relative[:200]!r} cannot be the name of a file ({error}); correct it") from error
    if not path.is_relative_to(run_dir.resolve()):
        raise RaylignError(f"artifact {relative!r} is outside the run directory {run_dir}; copy it into the run first")
    return path


def require_free(folder: Path, needed: int, what: str, cure: str) -> None:
    """Raises DiskError when the disk under `folder` has less than the `needed` bytes free that `what` takes."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(f"{folder}: {free / 1e6:.0f} MB free, {what} needs {needed / 1e6:.0f} MB; {cure}")


def publish_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then fsync it and rename it to `path`. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
