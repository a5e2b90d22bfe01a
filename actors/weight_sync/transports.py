"""How weights travel. A transport moves them; `publish` decides when and verifies."""

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from actors.generator_pool import GeneratorPool
from actors.trainer_group import TrainerGroup
from actors.weight_sync.manifest import Manifest, file_manifest, require_same
from raylign.errors import PlacementError, WeightSyncError

Transport = Literal["lora", "shm", "nccl"]
_SHARED_MEMORY = Path("/dev/shm")


class WeightTransport(Protocol):
    """Moves the trainer's weights to paused generators, which then serve them as `version`."""

    def push(self, trainers: TrainerGroup, generators: GeneratorPool, version: int, timeout_s: float) -> None:
        """Raises WeightSyncError, TrainerError or GeneratorError; after any of them the engines are not to be used."""
        ...


def choose_transport(named: str, *, device: Literal["cpu", "gpu"], adapter: bool, own_devices: bool) -> Transport:
    """`adapter` says whether the generators' checkpoint under an adapter is the policy.

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
    if named in ("lora", "shm", "nccl"):
        return named  # type: ignore[return-value]
    if device == "cpu":
        return "shm"
    if adapter:
        return "lora"
    return "nccl" if own_devices else "shm"


@dataclass(frozen=True, slots=True)
class ShmTransport:
    """Merged weights as one safetensors file in shared memory, checked against `manifest`, mapped by each engine."""

    directory: Path
    manifest: Manifest
    bytes_per_weight: int

    def push(self, trainers: TrainerGroup, generators: GeneratorPool, version: int, timeout_s: float) -> None:
        require_room(self.directory, self.bytes_per_weight * sum(math.prod(shape) for shape in self.manifest.values()))
        path = self.directory / f"version-{version}.safetensors"
        try:
            trainers.save_weights(str(path))
            load_file(generators, path, self.manifest, version, timeout_s)
        finally:
            path.unlink(missing_ok=True)


def load_file(generators: GeneratorPool, path: Path, manifest: Manifest, version: int, timeout_s: float) -> None:
    """Serve the weights in `path` as `version`. A file that does not fit `manifest` is refused before any change."""
    require_same(manifest, file_manifest(path))
    generators.call("start_weight_update", timeout_s=timeout_s, what="starting a weight update")
    generators.call("update_weights", {"path": str(path)}, timeout_s=timeout_s, what="loading weights")
    generators.call("finish_weight_update", str(version), timeout_s=timeout_s, what="finishing a weight update")


@dataclass(frozen=True, slots=True)
class LoraTransport:
    """The adapter alone as a PEFT folder in shared memory, swapped in place."""

    directory: Path

    def push(self, trainers: TrainerGroup, generators: GeneratorPool, version: int, timeout_s: float) -> None:
        folder = self.directory / f"version-{version}"
        try:
            trainers.save_adapter(str(folder))
            generators.call("load_adapter", str(folder), version, timeout_s=timeout_s, what="loading the adapter")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class NcclTransport:
    """Merged weights broadcast from trainer rank 0 to every engine worker with vLLM's packed NCCL engine."""

    workers: int

    def push(self, trainers: TrainerGroup, generators: GeneratorPool, version: int, timeout_s: float) -> None:
        trainers.send_nccl(generators.handles, self.workers, timeout_s)
        generators.call("label", version, timeout_s=timeout_s, what="labelling the version")


def shared_folder() -> Path:
    """Where weight files go: shared memory, or the temporary folder of a system without it."""
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def require_room(directory: Path, needed: int) -> None:
    """Raises WeightSyncError when `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise WeightSyncError(
            f"{directory}: {free / 1e6:.0f} MB free, a weight push needs {needed / 1e6:.0f} MB; enlarge /dev/shm "
            "(docker --shm-size, or an emptyDir with medium: Memory on Kubernetes)"
        )
