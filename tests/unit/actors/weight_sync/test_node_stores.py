"""Weight files on several nodes: what a node's store does, and how a push brings chunks to the others."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayError
from safetensors.torch import load_file, save_file

from actors.weight_sync import folder as folders
from actors.weight_sync import nodes
from actors.weight_sync.nodes import ManyNodes, SharedMemoryStore, node_folders
from raylign.errors import WeightSyncError

WRITER, NEAR, FAR = "0" * 56, "1" * 56, "2" * 56


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "shared_folder", lambda: tmp_path)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    return tmp_path


def test_a_store_reads_and_writes_in_any_order(shared_memory: Path) -> None:
    store = SharedMemoryStore("run")
    folder = store.new_folder()
    written = np.arange(256, dtype=np.uint8)
    store.write(f"{folder}/w", 100, written[100:])
    store.write(f"{folder}/w", 0, written[:100])
    assert store.sizes(folder) == {"w": 256}
    assert (store.read(f"{folder}/w", 0, 1000) == written).all()
    assert (store.read(f"{folder}/w", 250, 1000) == written[250:]).all()
    store.remove(folder)
    store.close()
    assert list(shared_memory.iterdir()) == []


def test_a_store_without_room_names_its_node(shared_memory: Path) -> None:
    store = SharedMemoryStore("run")
    free = shutil.disk_usage(shared_memory).free
    store.require_room(free // 2)
    with pytest.raises(WeightSyncError, match=r"on 10\.0\.0\.1: \d+ MB free, a weight push needs .*enlarge /dev/shm"):
        store.require_room(10 * free)
    store.close()


@dataclass
class Reader:
    """A handle of an actor on a node."""

    node: str


class InProcess(ManyNodes):
    """Stores of this process in place of actors; calls are done when they are asked."""

    def __init__(self) -> None:
        super().__init__("run", timeout_s=1.0)
        self.stores: dict[str, SharedMemoryStore] = {}
        self.started: list[str] = []

    def store(self, node: str) -> Any:
        if node not in self.stores:
            self.started.append(node)
            self.stores[node] = SharedMemoryStore(f"run-{node[0]}")
        return self.stores[node]


@dataclass(frozen=True)
class Ref:
    answer: Any


@pytest.fixture
def many(shared_memory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    alive = {WRITER, NEAR, FAR}

    def ask(store: SharedMemoryStore, method: Callable[..., Any], *args: Any) -> Ref:
        given = [argument.answer if isinstance(argument, Ref) else argument for argument in args]
        try:
            return Ref(getattr(store, method.__name__)(*given))
        except OSError as error:
            return Ref(RayError(str(error)))

    def get(ref: Ref, timeout: float) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    monkeypatch.setattr(nodes, "ask", ask)
    monkeypatch.setattr(nodes, "get_together", lambda refs, *_: [get(ref, 0) for ref in refs])
    monkeypatch.setattr(nodes, "process_of", lambda reader: reader)
    monkeypatch.setattr(nodes, "_alive", lambda: alive)
    monkeypatch.setattr(nodes, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs[:1], refs[1:]))
    monkeypatch.setattr(ray, "get", get)
    made = InProcess()
    made.alive = alive  # type: ignore[attr-defined]
    yield made
    for store in made.stores.values():
        store.close()


def push(many: InProcess, readers: Sequence[Reader]) -> tuple[Any, dict[str, torch.Tensor]]:
    weights = {"a": torch.randn(700), "b": torch.randn(3, 5)}
    with many.push(Reader(WRITER)) as folder:
        save_file(weights, f"{folder.path}/model.safetensors")
        Path(folder.path, "adapter_config.json").write_text("{}")
        assert folder.shapes("model.safetensors") == {"a": (700,), "b": (3, 5)}
        found = folder.spread(readers)
        for reader in readers:
            if reader.node in many.alive:  # type: ignore[attr-defined]
                where = found.inside("model.safetensors")
                loaded = load_file(where.elsewhere.get(reader.node, where.path))
                assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
                assert Path(found.elsewhere[reader.node], "adapter_config.json").read_text() == "{}"
        assert folder.nbytes() == sum(path.stat().st_size for path in Path(folder.path).iterdir())
    return found, weights


def test_a_push_reaches_every_node_once_in_chunks(many: InProcess, shared_memory: Path) -> None:
    push(many, [Reader(WRITER), Reader(NEAR), Reader(NEAR), Reader(FAR)])
    assert many.started == [WRITER, NEAR, FAR]
    left = [path for path in shared_memory.rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == [], "nothing of a push stays"


def test_readers_beside_the_writer_need_no_copy(many: InProcess) -> None:
    push(many, [Reader(WRITER)])
    assert many.started == [WRITER]


def test_a_node_that_is_lost_before_is_left_out(many: InProcess) -> None:
    many.alive.discard(FAR)  # type: ignore[attr-defined]
    found, _ = push(many, [Reader(NEAR), Reader(FAR)])
    assert set(found.elsewhere) == {WRITER, NEAR}


def test_a_node_that_is_lost_meanwhile_is_left_out(many: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(store: SharedMemoryStore, path: str, offset: int, chunk: Any) -> None:
        many.alive.discard(FAR)  # type: ignore[attr-defined]
        raise OSError("its node has died")

    store = many.store(FAR)
    monkeypatch.setattr(store, "write", lost.__get__(store))
    found, _ = push(many, [Reader(NEAR), Reader(FAR)])
    assert set(found.elsewhere) == {WRITER, NEAR}


def test_a_store_that_fails_on_a_living_node_is_an_error(many: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: SharedMemoryStore, path: str, offset: int, chunk: Any) -> None:
        raise OSError("No space left on device")

    store = many.store(NEAR)
    monkeypatch.setattr(store, "write", full.__get__(store))
    with pytest.raises(WeightSyncError, match="copying weights: .*No space left"):
        push(many, [Reader(NEAR)])


def test_a_run_on_the_drivers_node_alone_starts_no_store(shared_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def get_node_id(self) -> str:
            return WRITER

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    with node_folders("run", [WRITER, WRITER], 1.0) as found:
        assert isinstance(found, folders.OneNode)
        assert found.directory.parent == shared_memory
    assert list(shared_memory.iterdir()) == []
