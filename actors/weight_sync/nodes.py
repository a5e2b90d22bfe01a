"""Weight files of a run on several nodes: a folder in shared memory on each, and the way from one to the others."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.calls import actor_class, ask
from actors.supervision.endings import ended
from actors.supervision.processes import kill, process_of
from actors.supervision.watch import failure, get_together
from actors.weight_sync.folder import NodeFolders, OneNode, PushFolder, file_sizes, require_room, weight_folder
from actors.weight_sync.manifest import Manifest, file_manifest
from raylign.errors import WeightSyncError
from raylign.roles import NodePath

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Chunk = np.ndarray[Any, np.dtype[np.uint8]]
_CHUNK_BYTES = 64 << 20
_CHUNKS_AT_ONCE = 4
"""On their way to a node: its object store has room for them."""
_CLOSE_S = 10.0


class NodeStore(Protocol):
    """A process that keeps its node's folder for weight files, and exchanges them with those of other nodes."""

    def require_room(self, needed: int) -> None:
        """Raises WeightSyncError when the folder has less than `needed` bytes."""

    def new_folder(self) -> str:
        """A folder inside, for one push."""
        ...

    def remove(self, folder: str) -> None:
        """Remove it, if it is there."""

    def shapes(self, path: str) -> Manifest:
        """Names and shapes of the tensors in a safetensors file."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file in a folder."""
        ...

    def read(self, path: str, offset: int, count: int) -> Chunk:
        """At most `count` bytes of a file."""
        ...

    def write(self, path: str, offset: int, chunk: Chunk) -> None:
        """Put bytes into a file, which is made first."""

    def close(self) -> None:
        """Remove the node's folder."""


class SharedMemoryStore:
    """What such a process does. Its folder is gone when it ends. `NodeStore` tells of its methods."""

    def __init__(self, run_name: str) -> None:
        self._stack = ExitStack()
        self._directory = self._stack.enter_context(weight_folder(run_name))

    def require_room(self, needed: int) -> None:
        require_room(self._directory, needed, ray.util.get_node_ip_address())

    def new_folder(self) -> str:
        return tempfile.mkdtemp(dir=self._directory)

    def remove(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def shapes(self, path: str) -> Manifest:
        return file_manifest(Path(path))

    def sizes(self, folder: str) -> dict[str, int]:
        return file_sizes(folder)

    def read(self, path: str, offset: int, count: int) -> Chunk:
        return np.fromfile(path, np.uint8, count, offset=offset)

    def write(self, path: str, offset: int, chunk: Chunk) -> None:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.seek(offset)
            file.write(chunk.data)

    def close(self) -> None:
        self._stack.close()


_: type[NodeStore] = SharedMemoryStore
StoreActor = actor_class(NodeStore, f"{__name__}:SharedMemoryStore")


class ManyNodes:
    """The `NodeFolders` of a run on several nodes."""

    def __init__(self, run_name: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._run_name = run_name
        self._stores: dict[str, ActorHandle[NodeStore]] = {}

    def start(self, nodes: Sequence[str]) -> None:
        """Make the folders of all these nodes at the same time."""
        refs = [ask(self.store(node), NodeStore.require_room, 0) for node in nodes]
        get_together(refs, self.timeout_s, "making folders for weights", WeightSyncError)

    def require_room(self, needed: int) -> None:
        for node in self._stores.keys() & _alive():
            self.ask(node, NodeStore.require_room, needed)

    def store(self, node: str) -> ActorHandle[NodeStore]:
        """That of a node, started if there is none or it has died."""
        known = self._stores.get(node)
        if known is None or ended(known):
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            self._stores[node] = StoreActor.options(num_cpus=0, scheduling_strategy=place).remote(self._run_name)
        return self._stores[node]

    def ask(self, node: str, method: Callable[Concatenate[NodeStore, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a node's store. Raises ActorsLost when it is gone, WeightSyncError when it fails."""
        what = f"weight files on node {node[:8]}"
        return get_together([ask(self.store(node), method, *args, **kwargs)], self.timeout_s, what, WeightSyncError)[0]

    @contextmanager
    def push(self, writer: Any) -> Iterator[PushFolder]:
        folder = _ManyFolders(self, process_of(writer).node)
        try:
            yield folder
        finally:
            folder.remove()

    def close(self) -> None:
        """Remove all folders; those of nodes that do not answer go with their stores."""
        stores = list(self._stores.values())
        with suppress(RayError):
            ray.get([ask(store, NodeStore.close) for store in stores], timeout=_CLOSE_S)
        kill(stores)


class _ManyFolders:
    """A push's folder on the node of its writer, and copies on others."""

    def __init__(self, nodes: ManyNodes, node: str) -> None:
        self._nodes, self._node = nodes, node
        self._paths = {node: nodes.ask(node, NodeStore.new_folder)}

    @property
    def path(self) -> str:
        return self._paths[self._node]

    def shapes(self, name: str) -> Manifest:
        return self._nodes.ask(self._node, NodeStore.shapes, f"{self.path}/{name}")

    def nbytes(self) -> int:
        return sum(self._nodes.ask(self._node, NodeStore.sizes, self.path).values())

    def spread(self, readers: Sequence[Any]) -> NodePath:
        needed = {process_of(reader).node for reader in readers} & _alive()
        for node in sorted(needed - self._paths.keys()):
            self._paths[node] = self._nodes.ask(node, NodeStore.new_folder)
        self._copy(sorted(needed - {self._node}))
        return NodePath(self.path, dict(self._paths))

    def _copy(self, targets: Sequence[str]) -> None:
        """Each chunk leaves the writer's node once for all others, whose stores write it as it comes."""
        store = self._nodes.store
        waiting: dict[ObjectRef[None], str] = {}
        for name, size in self._nodes.ask(self._node, NodeStore.sizes, self.path).items() if targets else ():
            for offset in range(0, max(1, size), _CHUNK_BYTES):
                chunk = ask(store(self._node), NodeStore.read, f"{self.path}/{name}", offset, _CHUNK_BYTES)
                for node in [node for node in targets if node in self._paths]:
                    # Ray hands the store the chunk itself.
                    written = ask(
                        store(node), NodeStore.write, f"{self._paths[node]}/{name}", offset, cast(Chunk, chunk)
                    )
                    waiting[written] = node
                self._wait(waiting, (_CHUNKS_AT_ONCE - 1) * len(targets))
        self._wait(waiting, 0)

    def _wait(self, waiting: dict[ObjectRef[None], str], most: int) -> None:
        """Until `most` chunks are on their way. A node that is lost is left out."""
        while len(waiting) > most:
            done, _ = ray.wait(list(waiting), timeout=self._nodes.timeout_s)
            for ref in done or list(waiting)[:1]:
                node = waiting.pop(ref)
                try:
                    ray.get(ref, timeout=0)
                except RayError as cause:
                    if node in _alive():
                        raise failure(cause, self._nodes.timeout_s, "copying weights", WeightSyncError) from cause
                    log.warning("node %s is lost; no weights are copied to it", node[:8])
                    self._paths.pop(node, None)

    def remove(self) -> None:
        alive = _alive()
        for node in [node for node in self._paths if node in alive]:
            ask(self._nodes.store(node), NodeStore.remove, self._paths[node])


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def node_folders(run_name: str, nodes: Sequence[str], timeout_s: float) -> Iterator[NodeFolders]:
    """Folders for weight files on `nodes`, by Ray's ids; everything of them is gone at the end."""
    if set(nodes) <= {ray.get_runtime_context().get_node_id()}:
        with weight_folder(run_name) as directory:
            yield OneNode(directory)
        return
    many = ManyNodes(run_name, timeout_s)
    try:
        many.start(sorted(set(nodes)))
        yield many
    finally:
        many.close()
