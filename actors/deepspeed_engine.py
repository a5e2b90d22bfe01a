"""DeepSpeed engines, with the corrections that make every ZeRO stage take the same steps."""

from typing import Any

import deepspeed
import torch
from torch import nn


def start_engine(module: nn.Module, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `module`. Its first optimizer step is Adam's step 1 under every stage."""
    engine = deepspeed.initialize(model=module, config=config)[0]
    if config["zero_optimization"]["stage"] == 0 and config["bf16"]["enabled"] and "optimizer" in config:
        _forget_phantom_step(engine.optimizer.optimizer)
    return engine


def _forget_phantom_step(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed's plain bf16 optimizer allocates Adam's state by a step on zero gradients, which leaves the bias
    correction one step ahead: the first real update would be 0.74 of its size."""
    for state in optimizer.state.values():
        state["step"].zero_()


def gradient_norm(engine: Any) -> float | None:
    """Global norm before clipping of the plain fp32 engine, which keeps no record of it; None for all others.

    Call it after the last backward of a step and before the step.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
