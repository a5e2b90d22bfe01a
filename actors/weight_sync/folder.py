"""The folder in shared memory that weights pass through, and what an earlier run may have left there."""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from actors.supervision.janitor import clean_up_folder, remove_folder
from actors.weight_sync.manifest import Manifest, file_manifest
from raylign.errors import WeightSyncError
from raylign.roles import NodePath

log = logging.getLogger(__name__)

BACKEND = "raylign_shm"
"""Name of our own backend of vLLM's weight transfer: it reads a file of this folder."""
IPC_BACKEND = "raylign_ipc"
"""Of another one, which opens CUDA's handles."""
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _LOCK = "raylign-", ".lock"


class PushFolder(Protocol):
    """The folder of one push, on the node of the trainers' rank 0."""

    @property
    def path(self) -> str: ...

    def shapes(self, name: str) -> Manifest:
        """Names and shapes of the tensors in its safetensors file `name`."""
        ...

    def nbytes(self) -> int:
        """Of its files."""
        ...

    def spread(self, readers: Sequence[Any]) -> NodePath:
        """Bring its files to the nodes of the actors `readers`.

        Raises WeightSyncError when that fails; a node that is lost meanwhile is left out.
        """
        ...


class NodeFolders(Protocol):
    """The folders for weight files of all nodes of a run."""

    def require_room(self, needed: int) -> None:
        """Raises WeightSyncError when a node has less than `needed` bytes free."""

    def push(self, writer: Any) -> AbstractContextManager[PushFolder]:
        """A folder on the node of the actor `writer`; gone on every node at the end."""
        ...


@dataclass(frozen=True, slots=True)
class OneNode:
    """The `NodeFolders` of a run whose actors are all on the driver's node: nothing is copied."""

    directory: Path

    def require_room(self, needed: int) -> None:
        require_room(self.directory, needed)

    @contextmanager
    def push(self, writer: Any) -> Iterator[PushFolder]:
        # A generator that is replaced meanwhile gets a push of its own.
        folder = tempfile.mkdtemp(dir=self.directory)
        try:
            yield _OneFolder(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _OneFolder:
    path: str

    def shapes(self, name: str) -> Manifest:
        return file_manifest(Path(self.path) / name)

    def nbytes(self) -> int:
        return sum(file_sizes(self.path).values())

    def spread(self, readers: Sequence[Any]) -> NodePath:
        return NodePath(self.path)


def file_sizes(folder: str) -> dict[str, int]:
    """Bytes of each file in a folder."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}


def require_room(directory: Path, needed: int, node: str = "") -> None:
    """Raises WeightSyncError when `directory` has less than `needed` bytes free; `node` is named if it is another."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        where = f"{directory} on {node}" if node else str(directory)
        raise WeightSyncError(
            f"{where}: {free / 1e6:.0f} MB free, a weight push needs {needed / 1e6:.0f} MB; enlarge /dev/shm "
            "(docker --shm-size, or an emptyDir with medium: Memory on Kubernetes)"
        )


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
