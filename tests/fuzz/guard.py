"""What a reader may do with any input: succeed, or raise a RaylignError with a cure, in 10 CPU seconds and 1 GiB."""

import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from raylign.errors import RaylignError

CPU_S = 10
MEMORY = 1 << 30


_folders: list[tempfile.TemporaryDirectory[str]] = []


def folder_until_exit() -> Path:
    """A new folder, in shared memory where there is some; it goes with this process."""
    shared = Path("/dev/shm")
    _folders.append(tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    return Path(_folders[-1].name)


class Defect(AssertionError):
    """A reader broke its promise."""


class Slow(BaseException):
    """Past the CPU seconds of one input; no reader's `except Exception` may take it."""


@contextmanager
def limited_memory() -> Iterator[None]:
    """This process may map 1 GiB more than now. Raises MemoryError inside, past it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def limited_cpu() -> Iterator[None]:
    """Raises Slow after `CPU_S` CPU seconds of this process inside, whatever the machine's load."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Slow

    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = resource.getrlimit(resource.RLIMIT_CPU)
    handler = signal.signal(signal.SIGXCPU, stop)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_S, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, limits)
        signal.signal(signal.SIGXCPU, handler)


def read(reader: Callable[[bytes], object], data: bytes) -> bool:
    """Whether `reader` takes `data`. Raises Defect when it neither takes nor refuses it as it must."""
    try:
        with limited_cpu():
            reader(data)
    except RaylignError as error:
        require_cure(error)
        return False
    except Slow:
        raise Defect(f"more than {CPU_S} CPU seconds") from None
    except MemoryError as error:
        raise Defect(f"more than {MEMORY >> 20} MiB") from error
    except Exception as error:
        raise Defect(f"{type(error).__name__}: {str(error)[:300]}") from error
    return True


def require_cure(error: RaylignError) -> None:
    """Raises Defect unless the error says what to do, in a part of its own: after a semicolon, in a second sentence or
    line, or in `cure`.
    """
    message = str(error)
    if len(message) > 5000:
        raise Defect(f"a message of {len(message)} characters: {message[:300]!r}")
    told = (";", ". ", "\n", " should ", " must ", "did you mean", "known ", " give ", " needs ", " is one of ")
    if not error.cure and not any(piece in message for piece in told):
        raise Defect(f"{type(error).__name__} without a cure: {message[:300]!r}")
