"""Files that appear whole or not at all, and records that are read from them."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from raylign.errors import DiskError, RaylignError, RecordError
from raylign.report.text import escape_control

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

log = logging.getLogger(__name__)
T = TypeVar("T")
_SHOWN = 60
GO_ON = "`raylign resume RUN` does again what it stands for"


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


def read_record(path: Path, kind: TypeAdapter[T], cure: str = "restore it from a copy") -> T:
    """The JSON file `path` as `kind`, whose types are taken strictly; fields that `kind` does not have are passed over.

    Raises RecordError with `cure`, naming the first thing that is wrong.
    """
    try:
        if not path.is_file():
            raise unreadable(path, "there is no such file" if not path.exists() else "it is no file", cure)
        return kind.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), cure) from error
    except ValidationError as error:
        raise unreadable(path, first_problem(error), cure) from error


def finished_record(path: Path, kind: TypeAdapter[T]) -> T | None:
    """The record of something that is finished; None where it is not: there is none, or it cannot be read any more.

    What cannot be read is said, once.
    """
    if not os.path.lexists(path):
        return None
    try:
        return read_record(path, kind, GO_ON)
    except RecordError as error:
        say_once(f"{error}, so it counts as not finished; {error.cure}")
        return None


def unreadable(path: Path, problem: str, cure: str) -> RecordError:
    """For a file of a run that is not what a run writes."""
    error = RecordError(f"{path} cannot be read: {problem}")
    error.cure = cure
    return error


def first_problem(error: ValidationError) -> str:
    """`steps.0.loss: Input should be a valid number (got 'x')` of the first of them."""
    detail = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] in ("json_invalid", "missing"):
        got = ""
    else:
        text = repr(detail["input"])
        got = f" (got {text if len(text) <= _SHOWN else f'{text[: _SHOWN - 3]}...'})"
    return escape_control(f"{f'{place}: ' if place else ''}{detail['msg']}{got}")


@cache
def say_once(message: str) -> None:
    """Warn; not again in this process."""
    log.warning(message)
