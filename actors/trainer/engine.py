"""What a trainer rank drives: a module, its optimizer and their steps. Without ZeRO raylign's own, else DeepSpeed's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.trainer.deepspeed_engine import ZeroEngine, deepspeed_config, require_dtype
from actors.trainer.state import Access, OptimizerState
from raylign.config.blocks import Dtype, TrainerBlock
from raylign.training.masters import MasterWeights

_BUCKET_BYTES = 64 << 20
"""Gradients that ranks add up at a time; each time costs a copy of that size."""


class TrainingEngine(Protocol):
    """The module in training on one rank; every rank must make every call."""

    @property
    def module(self) -> nn.Module:
        """What is trained. Call it to score."""

    @property
    def training_module(self) -> nn.Module:
        """Call it for a loss that goes to `backward`."""

    @property
    def state(self) -> OptimizerState:
        """Weights and moments in fp32."""

    @property
    def loss_scale(self) -> float | None:
        """What `backward` multiplies the loss by, so that float16 holds its gradients; None in other dtypes."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` before a step."""

    def step(self, rate: float) -> float | None:
        """AdamW on the mean of the ranks' clipped gradients, which are then gone.

        Returns their global norm before clipping; None when they are not finite, and no weight changes.
        """

    def training_tensors(self) -> Iterator[Tensor]:
        """What lies on the device for training alone: masters, moments, gradients; weights may be among them."""

    def loss_scaler(self) -> Mapping[str, float]:
        """What the loss scale goes on from; {} where there is none."""

    def set_loss_scaler(self, state: Mapping[str, float]) -> None:
        """Take what `loss_scaler` gave, or nothing where there is no loss scale."""


class ReplicatedEngine:
    """Every rank holds all weights, gradients and moments: ZeRO stage 0."""

    loss_scale = None

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], block: TrainerBlock, device: torch.device
    ) -> None:
        self.module = self.training_module = module.to(device)
        self.state = MasterWeights(parameters, block)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def step(self, rate: float) -> float | None:
        if dist.get_world_size() > 1:
            for bucket in _buckets(self.state.gradients()):
                _average(bucket)
        return self.state.step(rate)

    def training_tensors(self) -> Iterator[Tensor]:
        return self.state.tensors()

    def loss_scaler(self) -> Mapping[str, float]:
        return {}

    def set_loss_scaler(self, state: Mapping[str, float]) -> None:
        """There is none."""


def training_engine(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    block: TrainerBlock,
    dtype: Dtype,
    device: torch.device,
    writable: Access,
) -> TrainingEngine:
    """The engine of `block` around `module`, whose `parameters` are trained; steps are alike at every stage.

    `writable` makes sharded parameters whole and writes to them last. Raises TrainerError when the device does not
    compute in `dtype`.
    """
    require_dtype(dtype)
    # DeepSpeed has the loss scale of float16, and not for its stage 0.
    if block.zero_stage == 0 and dtype != "float16":
        return ReplicatedEngine(module, parameters, block, device)
    return ZeroEngine(module, parameters, deepspeed_config(block, dtype), block, writable)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, up to `_BUCKET_BYTES` at a time; a larger one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _average(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all ranks in their place."""
    flat = tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    if len(tensors) > 1:
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
