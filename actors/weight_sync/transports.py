"""How weights travel. A transport moves them; `publish` decides when and verifies."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from actors.weight_sync.folder import BACKEND
from actors.weight_sync.manifest import Manifest, checkpoint_manifest, file_manifest, require_same
from raylign.config import OnlineDpoConfig
from raylign.errors import PlacementError, WeightSyncError
from raylign.roles import Engines, Generator, Trainers

Name = Literal["lora", "shm", "nccl"]


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

    engine: ClassVar[EngineEnd]
    takes_newcomers: ClassVar[bool]
    """Whether a push can go to one generator alone, which has started later than the others."""

    @property
    def needed_bytes(self) -> int:
        """Room in shared memory that a push takes; 0 where that does not count."""
        ...

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> None:
        """Raises WeightSyncError, TrainerError or GeneratorError; after any of them the engines are not to be used."""
        ...


def choose_transport(
    named: Name | Literal["auto"],
    *,
    device: Literal["cpu", "gpu"],
    adapter: bool,
    own_devices: bool,
    keeps_base: bool = False,
) -> Name:
    """`adapter` says whether the generators' checkpoint under an adapter is the policy.

    `keeps_base`: the generators must answer without that adapter too, so that it cannot be merged. Otherwise
    `auto`: on CPU merged weights through shared memory, because vLLM decodes adapters several times slower there; on
    GPU the adapter alone, else NCCL between separate GPUs, else shared memory.
    """
    if named == "nccl" and device == "cpu":
        raise PlacementError(
            "generators.weight_sync.transport=nccl needs GPUs, and this run is on CPU; use auto or shm"
        )
    if named == "nccl" and not own_devices:
        raise PlacementError(
            "generators.weight_sync.transport=nccl needs a GPU of its own per actor; set placement.mode=disaggregated"
        )
    if named != "auto":
        return named
    if device == "cpu" and not keeps_base:
        return "shm"
    if adapter:
        return "lora"
    return "nccl" if own_devices else "shm"


@dataclass(frozen=True, slots=True)
class ShmTransport:
    """Merged weights as one safetensors file in shared memory, checked against `manifest`, mapped by each engine."""

    engine: ClassVar[EngineEnd] = EngineEnd("shm", BACKEND, opens_itself=True)
    takes_newcomers: ClassVar[bool] = True
    directory: Path
    manifest: Manifest
    bytes_per_weight: int

    @property
    def needed_bytes(self) -> int:
        """Room that a push takes."""
        return self.bytes_per_weight * sum(math.prod(shape) for shape in self.manifest.values())

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> None:
        require_room(self.directory, self.needed_bytes)
        with _own_folder(self.directory) as folder:
            path = folder / "model.safetensors"
            trainers.save_weights(str(path))
            load_file(generators, path, self.manifest, version, timeout_s)


def load_file(generators: Engines, path: Path, manifest: Manifest, version: int, timeout_s: float) -> None:
    """Serve the weights in `path` as `version`. A file that does not fit `manifest` is refused before any change."""
    require_same(manifest, file_manifest(path))
    generators.call("loading weights", timeout_s, Generator.take_weights, str(path), version)


@dataclass(frozen=True, slots=True)
class LoraTransport:
    """The adapter alone as a PEFT folder in shared memory, swapped in place."""

    engine: ClassVar[EngineEnd] = EngineEnd("lora", None)
    takes_newcomers: ClassVar[bool] = True
    needed_bytes: ClassVar[int] = 0
    directory: Path

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> None:
        with _own_folder(self.directory) as folder:
            trainers.save_adapter(str(folder))
            generators.call("loading the adapter", timeout_s, Generator.take_adapter, str(folder), version)


@contextmanager
def _own_folder(directory: Path) -> Iterator[Path]:
    """For one push: a generator that is replaced meanwhile gets a push of its own."""
    folder = Path(tempfile.mkdtemp(dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class NcclTransport:
    """Merged weights broadcast from trainer rank 0 to every engine worker with vLLM's packed NCCL engine."""

    engine: ClassVar[EngineEnd] = EngineEnd("nccl", "nccl")
    takes_newcomers: ClassVar[bool] = False
    needed_bytes: ClassVar[int] = 0
    workers: int

    def push(self, trainers: Trainers, generators: Engines, version: int, timeout_s: float) -> None:
        generators.call("pausing the generators", timeout_s, Generator.pause)
        trainers.send_nccl(generators.handles, self.workers, timeout_s)
        generators.call("labelling the version", timeout_s, Generator.label, version)
        generators.call("resuming the generators", timeout_s, Generator.resume)


def weight_transport(
    config: OnlineDpoConfig, folder: str, device: Literal["cpu", "gpu"], directory: Path
) -> WeightTransport:
    """The transport of a run whose model is in `folder`; what passes through shared memory does so in `directory`.

    Raises PlacementError when it cannot be, WeightSyncError when `folder` has no weights.
    """
    match choose_transport(
        config.generators.weight_sync.transport,
        device=device,
        adapter=config.model.adapter_fits_checkpoint,
        own_devices=config.placement.mode == "disaggregated",
        keeps_base=config.sampling.reference_generations > 0,
    ):
        case "shm":
            return ShmTransport(directory, checkpoint_manifest(Path(folder)), config.model.itemsize)
        case "lora":
            return LoraTransport(directory)
        case "nccl":
            return NcclTransport(config.generators.count * config.generators.tensor_parallel_size)


def require_room(directory: Path, needed: int) -> None:
    """Raises WeightSyncError when `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise WeightSyncError(
            f"{directory}: {free / 1e6:.0f} MB free, a weight push needs {needed / 1e6:.0f} MB; enlarge /dev/shm "
            "(docker --shm-size, or an emptyDir with medium: Memory on Kubernetes)"
        )
