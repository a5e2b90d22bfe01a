"""What a trainer needs to go on: fp32 weights and Adam's moments, parameter by parameter, as safetensors.

Whole parameters under their names fit any number of ranks and any ZeRO stage; DeepSpeed's own checkpoints are pickles
that fit the same ones only.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from actors.trainer.process_group import Sharding
from raylign.errors import TrainerError
from raylign.losses import LossState
from raylign.models.load import is_adapted
from raylign.run.files import disk_errors, read_record
from raylign.run.tensor_file import save_tensors
from raylign.training.masters import Kind
from raylign.training.weights import adapter_weights, checkpoint_weights

WEIGHTS: Kind = "weights"
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
STATE_NAME = "state.json"
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a trainer goes on from beside tensors: `state.json`. Made and read by trainer ranks.

    `steps_done` optimizer steps are taken, `followed` rounds are in the reference, the learning rate was warm at
    `warm_at` (in rounds).
    """

    steps_done: int
    followed: int
    loss: LossState
    warm_at: float
    loss_scaler: Mapping[str, int | float]


_STATE = TypeAdapter(TrainerState)
Named = Iterator[tuple[str, Tensor]]
Access = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


class OptimizerState(Protocol):
    """An optimizer's view of whole parameters; every rank must make every call."""

    def names(self) -> Sequence[str]:
        """Of all trained parameters."""

    def numel(self) -> int:
        """Elements of all trained parameters together."""

    def has_moments(self) -> bool:
        """Whether a step was taken or moments were made."""

    def make_moments(self, steps: int) -> None:
        """Moments to write to, with Adam's count of `steps`."""

    def read(self, name: str, kind: Kind) -> Tensor:
        """A parameter's tensor, fp32 and whole."""

    def write(self, name: str, kind: Kind, value: Tensor) -> None:
        """Put `value`, whole, in its place; weights in the module too."""

    def round(self) -> None:
        """Give the module's weights the values that the last step gave them, once all is written."""


def state_tensors(state: OptimizerState) -> Named:
    """fp32 weights as `weights/NAME`, and moments as `exp_avg/NAME` once a step was taken."""
    kinds = (WEIGHTS, *MOMENTS) if state.has_moments() else (WEIGHTS,)
    return ((f"{kind}/{name}", state.read(name, kind)) for name in state.names() for kind in kinds)


def state_nbytes(state: OptimizerState) -> int:
    """Of all tensors, at most."""
    return 4 * (1 + len(MOMENTS)) * state.numel()


def load_tensors(state: OptimizerState, stored: "StoredTensors", steps: int) -> None:
    """Take what `state_tensors` gave, with Adam's count of `steps`. TrainerError when it is of another model."""
    names = state.names()
    if missing := sorted({f"{WEIGHTS}/{name}" for name in names} - stored.names()):
        raise TrainerError(
            f"the checkpoint has no {missing[0]} ({len(missing)} such); it is of another model or adapter"
        )
    with_moments = f"{MOMENTS[0]}/{names[0]}" in stored.names()
    if with_moments:
        state.make_moments(steps)
    for name in names:
        for kind in (WEIGHTS, *MOMENTS) if with_moments else (WEIGHTS,):
            state.write(name, kind, stored.get(f"{kind}/{name}"))
    state.round()


def own_part(value: Tensor, size: int) -> Tensor:
    """The `size` elements of the flattened `value` that this rank keeps, zeros beyond its end."""
    flat = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return flat.narrow(0, dist.get_rank() * size, size)


def whole(part: Tensor, shape: Sequence[int]) -> Tensor:
    """The whole parameter; every rank holds a `part` of it, the last ones padded."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: torch.Size(shape).numel()].view(*shape)


def store(folder: Path, tensors: Named) -> None:
    """Write tensors into files of about 1 GiB below `folder`, so that no more than that waits in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in tensors:
        waiting[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += waiting[name].nbytes
        if size >= _SHARD_BYTES:
            save_tensors(waiting.items(), folder / f"{number:05d}.safetensors")
            waiting, number, size = {}, number + 1, 0
    if waiting:
        save_tensors(waiting.items(), folder / f"{number:05d}.safetensors")


class StoredTensors:
    """What `store` wrote, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """Raises TrainerError when there is no such tensor."""
        if name not in self._files:
            raise TrainerError(f"the checkpoint has no {name}; it is of another model, adapter or reference.policy")
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found


def write_state(folder: Path, state: TrainerState) -> None:
    (folder / STATE_NAME).write_text(json.dumps(asdict(state)))


def read_state(folder: Path) -> TrainerState:
    """Raises RecordError when it is not what `write_state` wrote."""
    return read_record(folder / STATE_NAME, _STATE)


def write_weights(model: nn.Module, sharding: Sharding, rank: int, path: Path) -> None:
    """The merged weights as the safetensors file `path`; every rank must call it."""
    _write(checkpoint_weights(model, sharding.gather), sharding, rank, path)


def write_adapter(model: nn.Module, sharding: Sharding, rank: int, folder: Path) -> None:
    """The PEFT adapter, with a reward model's head, into `folder`; every rank must call it."""
    if not is_adapted(model):
        raise TrainerError("there is no adapter to save: model.lora is null")
    _write(adapter_weights(model, sharding.gather), sharding, rank, folder / "adapter_model.safetensors")
    if rank == 0:
        with disk_errors(folder):
            model.peft_config["default"].save_pretrained(str(folder))


def drain(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in gathering, and keep nothing."""
    for _ in tensors:
        pass


def _write(weights: Iterator[tuple[str, Tensor]], sharding: Sharding, rank: int, path: Path) -> None:
    if rank == 0:
        save_tensors(weights, path)
    elif sharding.zero3:
        drain(weights)
