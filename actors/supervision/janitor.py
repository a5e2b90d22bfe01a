"""A process that removes what a dead process left: its folders, its children and their shared memory.

Ray and the kernel end actors without warning; vLLM's message queues and our weight folders would then fill shared
memory, which is main memory, until the machine restarts. The janitor leaves its owner's process tree and session, so
that what ends the owner does not end it. This file is also the janitor's program: it imports psutil only.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_QUEUES = ("psm_", "sem.")
_POLL_S = 0.2
_SETTLE_S = 2.0
_GRACE_S = 5.0
_START_S = 60.0
_REMOVE_S = 10.0


def clean_up_family(pid: int, *folders: Path) -> None:
    """Once process `pid` has ended: end its children, remove the queues in shared memory they had mapped and `folders`.

    Its children are those it will have.
    """
    _start("family", pid, folders)


def clean_up_folder(pid: int, folder: Path) -> None:
    """Once process `pid` has ended: remove `folder`."""
    _start("folder", pid, [folder])


def clean_up_processes(pid: int, processes: Sequence[int]) -> None:
    """Once process `pid` has ended: end `processes`, which may be nobody's children by then."""
    _start("processes", pid, processes)


def _start(duty: str, pid: int, arguments: Sequence[object]) -> None:
    command = [sys.executable, "-I", str(Path(__file__).resolve()), duty, str(pid), *map(str, arguments)]
    # Ctrl-C goes to a terminal's whole process group.
    subprocess.run(command, check=True, timeout=_START_S, stdin=subprocess.DEVNULL, start_new_session=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, also while a process that is ending still writes into it. Raises OSError after 10 seconds."""
    deadline = time.monotonic() + _REMOVE_S
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _watch_family(owner: psutil.Process) -> None:
    family: set[psutil.Process] = {owner}
    segments: set[Path] = set()
    names: set[str] = set()
    settled = 0.0
    while _alive(owner):
        present = _queue_names()
        if present != names:
            names, settled = present, time.monotonic() + _SETTLE_S
        if time.monotonic() < settled:
            family |= _descendants(family)
            segments |= _mapped(family)
        time.sleep(_POLL_S)
    family |= _descendants(family)
    segments |= _mapped(family) | _named_after(family)
    _end(family - {owner})
    for segment in segments:
        segment.unlink(missing_ok=True)


def _wait_for(owner: psutil.Process) -> None:
    while _alive(owner):
        time.sleep(_POLL_S)


def _queues() -> list[os.DirEntry[str]]:
    if not _SHARED_MEMORY.is_dir():
        return []
    return [entry for entry in os.scandir(_SHARED_MEMORY) if entry.name.startswith(_QUEUES)]


def _queue_names() -> set[str]:
    return {entry.name for entry in _queues()}


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _descendants(family: set[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in family:
        with contextlib.suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return {process for process in found if process.pid != os.getpid()}


def _mapped(family: set[psutil.Process]) -> set[Path]:
    """Queues and semaphores in shared memory that the family has mapped.

    By inode: whoever makes a semaphore has it mapped under a name that is gone.
    """
    present = {entry.inode(): Path(entry.path) for entry in _queues()}
    found: set[Path] = set()
    for process in family:
        # psutil reads smaps, for which the kernel walks all pages of a process.
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/maps", errors="surrogateescape") as maps:
            inodes = {int(line.split(maxsplit=5)[4]) for line in maps if f" {_SHARED_MEMORY}/" in line}
            found |= {present[inode] for inode in inodes & present.keys()}
    return found


def _named_after(family: set[psutil.Process]) -> set[Path]:
    """Loky's semaphores carry their maker's process id; they are mapped only for a moment."""
    pids = {str(process.pid) for process in family}
    names = (name for name in _queue_names() if name.startswith("sem.loky-") and name.split("-")[1] in pids)
    return {_SHARED_MEMORY / name for name in names}


def _end(processes: set[psutil.Process]) -> None:
    """Children see their parent gone and end themselves; the rest is killed."""
    _, left = psutil.wait_procs([process for process in processes if _alive(process)], timeout=_GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_GRACE_S)


def _leave() -> bool:
    """Go on in a process without parent, session and output; False in the one that was started."""
    if os.fork():
        return False
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    return True


def _present(pids: Sequence[str]) -> set[psutil.Process]:
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(int(pid)))
    return found


def _main(duty: str, pid: str, arguments: Sequence[str]) -> None:
    owner = psutil.Process(int(pid))
    wards = _present(arguments) if duty == "processes" else set()
    if not _leave():
        return
    if duty == "family":
        _watch_family(owner)
    else:
        _wait_for(owner)
    _end(wards)
    for folder in arguments if duty != "processes" else []:
        remove_folder(Path(folder))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3:])
