"""Engines without ZeRO: which runs get one, and how ranks average their gradients."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import actors.trainer.engine
from actors.trainer.engine import ReplicatedEngine, training_engine
from raylign.config.blocks import TrainerBlock
from raylign.errors import TrainerError

CPU = torch.device("cpu")
RANKS = 3


def _engine(dtype: Any, module: nn.Module, **options: Any) -> Any:
    block = TrainerBlock.model_validate({"learning_rate": 1e-2, "max_grad_norm": 0.0, **options})
    return training_engine(module, dict(module.named_parameters()), block, dtype, CPU, lambda _: nullcontext())


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A group in which every rank has the same gradients; the sizes of what they summed."""
    sizes: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        sizes.append(tensor.numel())
        tensor.mul_(RANKS)

    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stage_0_is_no_engine_of_deepspeeds(dtype: Any) -> None:
    assert isinstance(_engine(dtype, nn.Linear(2, 2)), ReplicatedEngine)


def test_a_device_without_the_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    with pytest.raises(TrainerError, match="does not compute in bfloat16"):
        _engine("bfloat16", nn.Linear(2, 2))


@pytest.mark.parametrize(("bucket_bytes", "expected"), [(1 << 20, [14]), (16, [4, 2, 6, 2]), (32, [6, 8])])
def test_ranks_average_every_gradient_once_in_fp32(
    monkeypatch: pytest.MonkeyPatch, reduced: list[int], bucket_bytes: int, expected: list[int]
) -> None:
    """Also of a layer that took part in no backward pass of this rank, for it may have on another."""
    monkeypatch.setattr(actors.trainer.engine, "_BUCKET_BYTES", bucket_bytes)
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(3, 2)]).to(torch.bfloat16)
    engine = _engine("bfloat16", module)
    for last in (False, True):
        engine.backward(module[0](torch.tensor([1.0, 2.0], dtype=torch.bfloat16)).sum(), last=last)
    seen: list[Tensor] = []
    step = engine.state.step

    def see(rate: float) -> float | None:
        seen.extend(gradient.clone() for gradient in engine.state.gradients())
        norm: float | None = step(rate)
        return norm

    monkeypatch.setattr(engine.state, "step", see)
    norm = engine.step(1e-2)
    assert reduced == expected
    by_hand = [[[2.0, 4.0], [2.0, 4.0]], [2.0, 2.0], [[0.0] * 3] * 2, [0.0, 0.0]]
    assert [tensor.tolist() for tensor in seen] == by_hand
    assert all(tensor.dtype == torch.float32 for tensor in seen)
    assert norm == pytest.approx(48**0.5)


def test_there_is_no_loss_scale(reduced: list[int]) -> None:
    """A state of a float16 run goes on without one."""
    engine = _engine("bfloat16", nn.Linear(2, 2))
    engine.set_loss_scaler({"cur_scale": 1024.0})
    assert engine.loss_scale is None and engine.loss_scaler() == {}
