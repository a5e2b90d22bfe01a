"""fp32 weights and Adam's moments, whole parameters, of an optimizer of DeepSpeed's that shares them out over ranks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_full_optimizer_state
from torch import Tensor, nn

from actors.trainer.state import MOMENTS, WEIGHTS, Access, own_part
from raylign.training.masters import Kind, StochasticRounding

_FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimizers keep this rank's fp32 weights: ZeRO 3, ZeRO 1 and 2, and bf16's of ZeRO 1."""


class ZeroState:
    """Reads and writes them; every rank must make every call."""

    def __init__(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], writable: Access, *, in_bf16: bool
    ) -> None:
        """`parameters` are the trained ones by name; `writable` makes sharded ones whole and writes to them last."""
        self._optimizer, self._parameters, self._writable = optimizer, dict(parameters), writable
        self._rounding = ZeroRounding(optimizer, self._flat()) if in_bf16 else None

    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    def numel(self) -> int:
        return sum(_numel(parameter) for parameter in self._parameters.values())

    def has_moments(self) -> bool:
        return all(MOMENTS[0] in self._optimizer.optimizer.state[flat] for flat in self._flat())

    def make_moments(self, steps: int) -> None:
        for flat in self._flat():
            state = self._optimizer.optimizer.state[flat]
            state["step"] = torch.tensor(float(steps), device=flat.device)
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def read(self, name: str, kind: Kind) -> Tensor:
        parameter = self._parameters[name]
        found: Tensor = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHTS else safe_get_full_optimizer_state(parameter, kind)
        )
        return found

    def write(self, name: str, kind: Kind, value: Tensor) -> None:
        parameter = self._parameters[name]
        if kind == WEIGHTS:
            with torch.no_grad(), self._writable([parameter]):
                parameter.copy_(value)
        if hasattr(parameter, "ds_id"):
            _write_part(parameter, value, None if kind == WEIGHTS else kind)
        elif kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def rounded(self) -> AbstractContextManager[None]:
        """Around a step of DeepSpeed's, which rounds into bf16 stochastically."""
        return nullcontext() if self._rounding is None else self._rounding.step()

    def round(self) -> None:
        if self._rounding is not None and self.has_moments():
            self._rounding.again()

    def _flat(self) -> list[Tensor]:
        """The tensors that Adam knows: this rank's weights in fp32."""
        name = next(name for name in _FLAT if hasattr(self._optimizer, name))
        return list(getattr(self._optimizer, name))


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if hasattr(parameter, "ds_id") else parameter.numel()


def _write_part(parameter: Any, value: Tensor, key: str | None) -> None:
    """This rank's part under ZeRO-3; DeepSpeed's own setter takes no parameter that does not divide evenly."""
    part, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )
    part.data.copy_(own_part(value, part.numel()))


class ZeroRounding:
    """Gives DeepSpeed values of bf16 to copy, rounded up or down, and the exact ones back afterwards."""

    def __init__(self, optimizer: Any, flats: Sequence[Tensor]) -> None:
        """`optimizer` is DeepSpeed's; `flats` are this rank's fp32 weights, on which its AdamW steps."""
        self._optimizer, self._exact = optimizer, dict[Tensor, Tensor]()
        self._starts: dict[Tensor, int] = {}
        start = dist.get_rank() * sum(flat.numel() for flat in flats)
        for flat in flats:
            self._starts[flat] = start
            start += flat.numel()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of DeepSpeed's, which copies a part of the weights right after AdamW's step on that part."""
        adamw = self._optimizer.optimizer
        hook = adamw.register_step_post_hook(lambda *_: self._show(adamw.param_groups))
        try:
            yield
        finally:
            hook.remove()
            self._restore()

    def again(self) -> None:
        """Give the module the weights that the last step gave it, from the fp32 weights and AdamW's count of steps."""
        self._show([{"params": list(self._starts)}])
        try:
            if hasattr(self._optimizer, "update_lp_params"):
                self._optimizer.update_lp_params()
            else:
                for group in range(len(self._starts)):
                    self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        finally:
            self._restore()

    def _show(self, groups: Sequence[dict[str, Any]]) -> None:
        for flat in (flat for group in groups for flat in group["params"]):
            self._exact[flat] = flat.data
            step = int(self._optimizer.optimizer.state[flat]["step"])
            rounded = torch.empty_like(flat.data)
            StochasticRounding(step, flat.device).round(flat.data, rounded, self._starts[flat])
            flat.data = rounded

    def _restore(self) -> None:
        for flat, exact in self._exact.items():
            flat.data = exact
        self._exact.clear()
