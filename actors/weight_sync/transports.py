"""How weights travel. A transport moves them; `publish` decides when and verifies."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from actors.placement import PlacementPlan
from actors.weight_sync.folder import BACKEND, IPC_BACKEND, NodeFolders, PushFolder
from actors.weight_sync.manifest import Manifest, checkpoint_manifest, require_same
from raylign.config import OnlineDpoConfig
from raylign.errors import PlacementError
from raylign.roles import DeviceLink, Engines, Generator, NodePath, Trainers

Name = Literal["lora", "shm", "nccl", "ipc"]
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class EngineEnd:
    """A transport's part in an engine.

    `backend` is that of vLLM's weight transfer, None where the engine takes adapters and so can answer without one.
    With `opens_itself` the engine needs nobody to open its end.
    """

    name: Name
    backend: str | None
    opens_itself: bool = False


class WeightTransport(Protocol):
    """Moves the trainer's weights to idle generators, which then serve them as `version`."""

    @property
    def engine(self) -> EngineEnd: ...

    @property
    def needed_bytes(self) -> int:
        """Room in shared memory that a push takes on every node; 0 where that does not count."""
        ...

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> int:
        """Returns the bytes that each generator got.

        Raises WeightSyncError, TrainerError, GeneratorError or ActorsLost; after any of them the engines are not to be
        used before a push has succeeded.
        """
        ...


def choose_transport(
    named: Name | Literal["auto"],
    *,
    device: Literal["cpu", "gpu"],
    adapter: bool,
    own_devices: bool,
    ranks_beside: bool = True,
    keeps_base: bool = False,
) -> Name:
    """`adapter` says whether the generators' checkpoint under an adapter is the policy.

    `ranks_beside`: every generator that shares GPUs has a trainer rank on its own.
    `keeps_base`: the generators must answer without that adapter too, so that it cannot be merged. Otherwise
    `auto`: on CPU merged weights through shared memory, because vLLM decodes adapters several times slower there; on
    GPU the adapter alone, else NCCL between separate GPUs, CUDA's memory handles on the same ones, or shared memory.
    """
    if named in ("nccl", "ipc") and device == "cpu":
        raise PlacementError(
            f"generators.weight_sync.transport={named} needs GPUs, and this run is on CPU; use auto or shm"
        )
    if named == "nccl" and not own_devices:
        raise PlacementError(
            "generators.weight_sync.transport=nccl needs a GPU of its own per actor; set placement.mode=disaggregated"
        )
    if named == "ipc" and (own_devices or not ranks_beside):
        raise PlacementError(
            "generators.weight_sync.transport=ipc needs a trainer rank on the GPU of every generator; set "
            "placement.mode=colocated and trainer.ranks to generators.count or more, or use auto"
        )
    if named != "auto":
        return named
    if device == "cpu" and not keeps_base:
        return "shm"
    if adapter:
        return "lora"
    if own_devices:
        return "nccl"
    return "ipc" if ranks_beside else "shm"


@dataclass(frozen=True, slots=True)
class ShmTransport:
    """Merged weights as one safetensors file in the shared memory of every node, checked against `manifest`.

    Each engine maps the one of its node.
    """

    engine: ClassVar[EngineEnd] = EngineEnd("shm", BACKEND, opens_itself=True)
    folders: NodeFolders
    manifest: Manifest
    bytes_per_weight: int

    @property
    def needed_bytes(self) -> int:
        """Room that a push takes."""
        return weights_in(self.manifest) * self.bytes_per_weight

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> int:
        self.folders.require_room(self.needed_bytes)
        with self.folders.push(trainers.handles[0]) as folder:
            trainers.save_weights(f"{folder.path}/{_WEIGHTS}")
            require_same(self.manifest, folder.shapes(_WEIGHTS))
            file = _spread(folder, generators, timeout_s).inside(_WEIGHTS)
            generators.call("loading weights", timeout_s, Generator.take_weights, file, version)
            return folder.nbytes()


def _spread(folder: PushFolder, generators: Engines, timeout_s: float) -> NodePath:
    """Whoever is being replaced is waited for: before it has started nobody knows its node."""
    generators.call("finding the generators", timeout_s, Generator.version)
    return folder.spread(generators.handles)


@dataclass(frozen=True, slots=True)
class LoraTransport:
    """The adapter alone as a PEFT folder in the shared memory of every node, swapped in place."""

    engine: ClassVar[EngineEnd] = EngineEnd("lora", None)
    needed_bytes: ClassVar[int] = 0
    folders: NodeFolders

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> int:
        with self.folders.push(trainers.handles[0]) as folder:
            trainers.save_adapter(folder.path)
            files = _spread(folder, generators, timeout_s)
            generators.call("loading the adapter", timeout_s, Generator.take_adapter, files, version)
            return folder.nbytes()


@dataclass(frozen=True, slots=True)
class DeviceTransport:
    """Merged weights from GPU to GPU, by one of vLLM's packed engines. `workers` are those of one generator."""

    engine: EngineEnd
    link: DeviceLink
    workers: int
    manifest: Manifest
    bytes_per_weight: int
    needed_bytes: ClassVar[int] = 0

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> int:
        generators.call("pausing the generators", timeout_s, Generator.pause)
        trainers.send_weights(self.link, generators.handles, self.workers, timeout_s)
        generators.call("labelling the version", timeout_s, Generator.label, version)
        generators.call("resuming the generators", timeout_s, Generator.resume)
        return weights_in(self.manifest) * self.bytes_per_weight


NCCL = EngineEnd("nccl", "nccl")
IPC = EngineEnd("ipc", IPC_BACKEND)


def weight_transport(
    config: OnlineDpoConfig, folder: str, plan: PlacementPlan, folders: NodeFolders
) -> WeightTransport:
    """The transport of a run whose model is in `folder`; what passes through shared memory does so in `folders`.

    Raises PlacementError when it cannot be, WeightSyncError when `folder` has no weights.
    """
    name = choose_transport(
        config.generators.weight_sync.transport,
        device=plan.device,
        adapter=config.model.adapter_fits_checkpoint,
        own_devices=config.placement.mode == "disaggregated",
        ranks_beside=plan.ranks_beside,
        keeps_base=config.sampling.reference_generations > 0,
    )
    workers, itemsize = config.generators.tensor_parallel_size, config.model.itemsize
    match name:
        case "shm":
            return ShmTransport(folders, checkpoint_manifest(Path(folder)), itemsize)
        case "lora":
            return LoraTransport(folders)
        case "nccl":
            return DeviceTransport(NCCL, "nccl", workers, checkpoint_manifest(Path(folder)), itemsize)
        case "ipc":
            return DeviceTransport(IPC, "ipc", workers, checkpoint_manifest(Path(folder)), itemsize)


def weights_in(manifest: Manifest) -> int:
    """How many numbers the tensors have."""
    return sum(math.prod(shape) for shape in manifest.values())
