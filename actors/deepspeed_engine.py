"""DeepSpeed engines, with the corrections that make every ZeRO stage take the same steps."""

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from raylign.config.blocks import TrainerBlock
from raylign.errors import TrainerError


def frozen_engine(module: nn.Module, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `module` without an optimizer. Raises TrainerError as `training_engine` does."""
    _require_dtype(config)
    return deepspeed.initialize(model=module, config=config)[0]


def training_engine(module: nn.Module, config: dict[str, Any], block: TrainerBlock) -> Any:
    """A DeepSpeed engine around `module`. Its first optimizer step is Adam's step 1 under every stage.

    Raises TrainerError when the device does not compute in the wanted dtype.
    """
    _require_dtype(config)
    engine = deepspeed.initialize(model=module, optimizer=adamw(module, block), config=config)[0]
    if config["zero_optimization"]["stage"] == 0 and config["bf16"]["enabled"]:
        _forget_phantom_step(engine.optimizer.optimizer)
    if config["fp16"]["enabled"]:
        # The trainer says itself that the loss scale cannot be lowered any further.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def adamw(module: nn.Module, block: TrainerBlock) -> torch.optim.Optimizer:
    """PyTorch's AdamW in one pass over memory; DeepSpeed's configuration cannot ask for that."""
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=block.learning_rate,
        betas=(block.adam_beta1, block.adam_beta2),
        eps=block.adam_epsilon,
        weight_decay=block.weight_decay,
        fused=True,
    )


def _require_dtype(config: dict[str, Any]) -> None:
    device = get_accelerator()
    if config["fp16"]["enabled"] and not device.is_fp16_supported():
        raise TrainerError("this device does not compute in float16; set model.dtype=bfloat16 or float32")
    if config["bf16"]["enabled"] and not device.is_bf16_supported():
        raise TrainerError("this device does not compute in bfloat16; set model.dtype=float16 or float32")


def loss_scale(engine: Any) -> float:
    """What the loss is multiplied by before the backward pass; 1 for all dtypes but float16."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


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
