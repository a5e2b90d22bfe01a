"""The folder in shared memory that weights pass through, and what an earlier run may have left there."""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from actors.supervision.janitor import clean_up_folder, remove_folder

log = logging.getLogger(__name__)

BACKEND = "raylign_shm"
"""Name of our own backend of vLLM's weight transfer: it reads a file of this folder."""
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _LOCK = "raylign-", ".lock"


def shared_folder() -> Path:
    """Where weight files go: shared memory, or the temporary folder of a system without it."""
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


@contextmanager
def weight_folder(run_name: str) -> Iterator[Path]:
    """A folder for weight files; gone when the run ends, and when its process is killed.

    First those of runs that ended with their janitor, as in a container that is stopped, are removed.
    """
    sweep(shared_folder())
    directory = shared_folder() / f"{_PREFIX}{run_name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    # A signal may come at any moment, and while the janitor starts it ends that too.
    try:
        directory.mkdir(mode=0o700)
        clean_up_folder(os.getpid(), directory)
        # A lock and no process id: containers that share their memory number their processes apart.
        with FileLock(directory / _LOCK):
            yield directory
    finally:
        remove_folder(directory)


def sweep(parent: Path) -> None:
    """Remove the weight folders in `parent` that no process holds any more."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with FileLock(lock, blocking=False):
                log.warning("removing %s, which a run left behind", lock.parent)
                shutil.rmtree(lock.parent)
        except (Timeout, OSError):
            # In use, or another user's.
            continue
