"""Stochastic rounding under ZeRO, where DeepSpeed would round a rank's fp32 weights to the nearest of bf16."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylign.training.rounding import StochasticRounding


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
