"""What a stuck actor is doing: a signal makes it write the stacks of all its threads into the run directory."""

import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import IO, Any

from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.supervision.processes import process_of, send_signal

FOLDER = "stacks"
_OPEN: list[IO[str]] = []
"""Files of this process that the signal writes to; they stay open as long as it lives."""
_SEND_S = 60.0
_ANSWER_S = 5.0
_POLL_S = 0.1


def enable_stack_dumps(folder: str, name: str) -> None:
    """Let SIGUSR1 append the stacks of this process's threads to `folder`/`name`-PID.txt."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = (Path(folder) / f"{name}-{os.getpid()}.txt").open("a")
    _OPEN.append(file)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def dump_stacks(handle: ActorHandle[Any], folder: Path, name: str) -> str:
    """Make the actor behind `handle` write its stacks; returns where they are, or why there are none."""
    process = process_of(handle)
    if not process.pid:
        return "no stacks: it has no process"
    try:
        send_signal(process, signal.SIGUSR1, _SEND_S)
    except (RayError, OSError) as error:
        return f"no stacks: process {process.pid} cannot be signalled ({type(error).__name__})"
    path = folder / f"{name}-{process.pid}.txt"
    if _filled(path):
        return f"its stacks are in {path}"
    return f"process {process.pid} writes no stacks: it is stopped, hangs in the kernel, or has no access to {folder}"


def _filled(path: Path) -> bool:
    """Whether the file gets something within a few seconds."""
    deadline = time.monotonic() + _ANSWER_S
    while not (path.is_file() and path.stat().st_size):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def remove_empty(folder: Path) -> None:
    """Actors that were never asked leave empty files."""
    for path in folder.glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
