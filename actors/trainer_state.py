"""What a trainer needs to go on: fp32 weights and Adam's moments, parameter by parameter, as safetensors.

Whole parameters under their names fit any number of ranks and any ZeRO stage; DeepSpeed's own checkpoints are pickles
that fit the same ones only.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_full_optimizer_state
from safetensors import safe_open
from torch import Tensor, nn

from raylign.errors import TrainerError
from raylign.tensor_file import save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "weights"
STATE_NAME = "state.json"
_SHARD_BYTES = 1 << 30
_FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimizers keep this rank's fp32 weights: ZeRO 3, ZeRO 1 and 2, its BF16_Optimizer."""

Named = Iterator[tuple[str, Tensor]]
Access = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


class EngineState:
    """Reads and writes the optimizer's view of whole parameters; every rank must make every call."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], writable: Access) -> None:
        """`parameters` are the trained ones by name; `writable` makes sharded ones whole and writes to them last."""
        self._engine, self._parameters, self._writable = engine, parameters, writable
        optimizer = engine.optimizer
        self._adam = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
        self._masters = _masters(optimizer, parameters)

    def tensors(self) -> Named:
        """fp32 weights as `weights/NAME`, and moments as `exp_avg/NAME` once a step was taken."""
        kinds = (WEIGHTS, *MOMENTS) if self._stepped() else (WEIGHTS,)
        for name, parameter in self._parameters.items():
            for kind in kinds:
                yield f"{kind}/{name}", self._read(parameter, kind)

    def nbytes(self) -> int:
        """Of all tensors, at most."""
        return 4 * (1 + len(MOMENTS)) * sum(_numel(parameter) for parameter in self._parameters.values())

    def load(self, stored: "StoredTensors", steps: int) -> None:
        """Take what `tensors` gave, with Adam's count of `steps`. Raises TrainerError when it is of another model."""
        expected = {f"{WEIGHTS}/{name}" for name in self._parameters}
        if missing := sorted(expected - stored.names()):
            raise TrainerError(
                f"the checkpoint has no {missing[0]} ({len(missing)} such); it is of another model or adapter"
            )
        with_moments = f"{MOMENTS[0]}/{next(iter(self._parameters))}" in stored.names()
        if with_moments:
            self._allocate(steps)
        for name, parameter in self._parameters.items():
            for kind in (WEIGHTS, *MOMENTS) if with_moments else (WEIGHTS,):
                self._write(parameter, kind, stored.get(f"{kind}/{name}"))

    def _flat(self) -> list[Tensor]:
        """The tensors that Adam knows: this rank's weights in fp32."""
        for name in _FLAT:
            if hasattr(self._engine.optimizer, name):
                return list(getattr(self._engine.optimizer, name))
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def _stepped(self) -> bool:
        return all(MOMENTS[0] in self._adam.state[flat] for flat in self._flat())

    def _allocate(self, steps: int) -> None:
        for flat in self._flat():
            state = self._adam.state[flat]
            state["step"] = torch.tensor(float(steps), device=flat.device)
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if parameter in self._masters:
            master = self._masters[parameter]
            return master.detach() if kind == WEIGHTS else self._adam.state[master][kind]
        found: Tensor = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHTS else safe_get_full_optimizer_state(parameter, kind)
        )
        return found

    def _write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if kind == WEIGHTS:
            with torch.no_grad(), self._writable([parameter]):
                parameter.copy_(value)
        if parameter in self._masters:
            with torch.no_grad():
                self._read(parameter, kind).copy_(value)
        elif hasattr(parameter, "ds_id"):
            _write_part(parameter, value, None if kind == WEIGHTS else kind)
        elif kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


def _masters(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The whole fp32 tensor of each parameter where ranks have all of them, which is without ZeRO."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return {parameter: parameter for parameter in parameters.values()}
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {own: master for group in groups for own, master in zip(*group, strict=True)}


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if hasattr(parameter, "ds_id") else parameter.numel()


def _write_part(parameter: Any, value: Tensor, key: str | None) -> None:
    """This rank's part under ZeRO-3; DeepSpeed's own setter takes no parameter that does not divide evenly."""
    part, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )
    part.data.copy_(own_part(value, part.numel()))


def own_part(value: Tensor, size: int) -> Tensor:
    """The `size` elements of the flattened `value` that this rank keeps, zeros beyond its end."""
    flat = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return flat.narrow(0, dist.get_rank() * size, size)


def whole(part: Tensor, shape: Sequence[int]) -> Tensor:
    """The parameter of which every rank holds a `part`, the last ones padded."""
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


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    (folder / STATE_NAME).write_text(json.dumps(state))


def read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE_NAME).read_text())
    return state


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """Of float16's dynamic loss scale; {} for other dtypes."""
    if not engine.fp16_enabled():
        return {}
    scaler = engine.optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}


def set_loss_scaler(engine: Any, state: Mapping[str, float]) -> None:
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)
