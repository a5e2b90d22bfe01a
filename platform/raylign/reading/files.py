"""Files of others: regular ones alone, unpacked within limits, a row at a time."""

import errno
import gzip
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from raylign.reading.values import Refused

LONGEST_ROW = 16 << 20
"""Bytes of one row."""
LONGEST_TEXT = 64 << 20
"""Bytes of a file that is read as a whole."""
_RATIO, _FREE = 200, 1 << 20
"""A packed file may become this many times larger, or have this many bytes. Text becomes 3 to 20 times larger."""
_STEP = 1 << 16
"""Unpacked bytes between two looks at that; there is one at the end too."""
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_COPY = "write what it gives to a file, and name that"


def open_plain(path: Path) -> BinaryIO:
    """A regular file, unpacked if its name ends in .gz.

    Raises OSError, and Refused for a pipe, device or socket, which may have no end. Reading raises Refused where a
    packed file becomes absurdly large.
    """
    # A pipe that nobody writes to would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    return cast(BinaryIO, _Unpacked(file)) if path.suffix == ".gz" else file


def require_plain_files(folder: Path) -> None:
    """Raises Refused when a file in `folder`, or one folder below, is a pipe, device or socket."""
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if os.path.exists(file) and not file.is_dir():
            _require_regular(file, file.stat().st_mode)


def read_text(path: Path, limit: int = LONGEST_TEXT) -> str:
    """The text of a regular file of at most `limit` bytes. Raises OSError, UnicodeDecodeError and Refused."""
    with open_plain(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"longer than {limit >> 10:,} KiB", "give a shorter file")
    return data.decode("utf-8-sig")


def plain_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. Raises Refused at one of more than `LONGEST_ROW` bytes."""
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise Refused(f"line {number} is longer than {LONGEST_ROW >> 20} MiB", "give one row per line")
        yield line


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise Refused(f"{path.name} is {name}, not a file", _COPY)


class _Unpacked(gzip.GzipFile):
    """A packed file that refuses to go on where little becomes very much."""

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed
        self._unchecked = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._check(len(data))
        return data

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(-1 if size is None else size)
        self._check(len(line))
        return line

    def close(self) -> None:
        super().close()
        self._packed.close()

    def _check(self, more: int) -> None:
        self._unchecked += more
        if more and self._unchecked < _STEP:
            return
        self._unchecked = 0
        packed, unpacked = self._packed.tell(), self.tell()
        if unpacked > _FREE + _RATIO * packed:
            raise Refused(
                f"its first {packed:,} bytes become {unpacked:,}, more than {_RATIO} times as many",
                "unpack it, look at what is in it, and name the unpacked file",
            )
