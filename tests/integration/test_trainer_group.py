"""Real DeepSpeed ranks in Ray actors: every ZeRO stage, rank count and accumulation takes the same steps."""

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file

from actors.network import free_address
from actors.trainer import TrainerRank, TrainerSpec
from actors.trainer_group import TrainerGroup
from raylign.config.blocks import LoraBlock, ModelBlock, TrainerBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.errors import TrainerError
from raylign.records import Candidate, Preference, Prompt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("resources")]

_RATE = 1e-2
_STEPS_OF_12 = 2


def _candidate(index: int, token_ids: Sequence[int]) -> Candidate:
    return Candidate("p", index, tuple(token_ids), (0.0,) * len(token_ids), "", "stop", 0, 0)


def _preferences(number: int) -> list[Preference]:
    tokens = (1000 + 7 * step for step in count())
    made = []
    for index in range(number):
        prompt = Prompt(f"p{index}", (), tuple(next(tokens) for _ in range(5 + index % 3)))
        pair = tuple(_candidate(i, [next(tokens) for _ in range(3 + (index + i) % 4)]) for i in range(2))
        made.append(Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0)))
    return made


def _group(folder: str, trainer: TrainerBlock, lora: LoraBlock | None, dtype: str = "float32") -> TrainerGroup:
    model = ModelBlock.model_validate({"path": folder, "dtype": dtype, "lora": lora})
    loss, reference = SigmoidLossBlock(beta=0.1), InitialReferenceBlock()
    spec = TrainerSpec(folder, folder, 2, model, trainer, loss, reference, 10, 0, threads=1, on_gpu=False)
    address, port = free_address()
    handles = [TrainerRank.options(num_cpus=1).remote(spec, rank, address, port) for rank in range(trainer.ranks)]
    return TrainerGroup(handles, loss=loss, reference=reference, step_timeout_s=300)


def _trajectory(
    folder: str, lora: LoraBlock | None, *, dtype: str = "float32", **options: Any
) -> list[dict[str, float]]:
    block = TrainerBlock.model_validate(
        {"learning_rate": _RATE, "lr_scheduler_type": "constant", "num_train_epochs": 2, **options}
    )
    group = _group(folder, block, lora, dtype)
    try:
        preferences = group.with_reference(_preferences(12), seed=3, rounds_done=0)
        return list(group.train(preferences, seed=3))
    finally:
        for handle in group.handles:
            ray.kill(handle)


LORA = LoraBlock(r=4, lora_alpha=8)
BASELINE: dict[str, Any] = {
    "ranks": 1,
    "zero_stage": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
SAME_STEPS: dict[str, dict[str, Any]] = {
    "8 times 1": {"ranks": 1, "zero_stage": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "2 ranks": {"ranks": 2, "zero_stage": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "2 ranks, ZeRO 1": {
        "ranks": 2,
        "zero_stage": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "2 ranks, ZeRO 2": {
        "ranks": 2,
        "zero_stage": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "2 ranks, ZeRO 3": {
        "ranks": 2,
        "zero_stage": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.fixture(scope="module")
def baselines(tiny_llama: str) -> dict[bool, list[dict[str, float]]]:
    """Plain single-rank fp32 trajectories, keyed by whether an adapter is trained."""
    return {bool(lora): _trajectory(tiny_llama, lora, **BASELINE) for lora in (None, LORA)}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("options", SAME_STEPS.values(), ids=SAME_STEPS.keys())
def test_same_trajectory(
    tiny_llama: str, baselines: dict[bool, list[dict[str, float]]], options: dict[str, Any], lora: LoraBlock | None
) -> None:
    expected, found = baselines[bool(lora)], _trajectory(tiny_llama, lora, **options)
    assert len(expected) == len(found) == 2 * _STEPS_OF_12
    for step, (left, right) in enumerate(zip(expected, found, strict=True)):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"):
            assert right[name] == pytest.approx(left[name], rel=2e-4, abs=2e-5), (step, name)


def test_first_step_is_ln_2_and_training_learns(baselines: dict[bool, list[dict[str, float]]]) -> None:
    for steps in baselines.values():
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert steps[0]["rewards/margins"] == 0.0
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
        assert steps[-1]["rewards/accuracies"] > 0.9


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_starts_at_ln_2_and_stages_agree(tiny_llama: str, stage: int) -> None:
    """bf16 rounds differently per batch shape, so stages are compared on one and the same shape."""
    options: dict[str, Any] = {"per_device_train_batch_size": 8}
    plain = _trajectory(tiny_llama, LORA, dtype="bfloat16", zero_stage=1, **options)
    found = _trajectory(tiny_llama, LORA, dtype="bfloat16", zero_stage=stage, **options)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for left, right in zip(plain, found, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=5e-3)


def test_adam_matches_torch(tiny_llama: str, baselines: dict[bool, list[dict[str, float]]]) -> None:
    """Step 1 of Adam moves every trained weight by the learning rate: no stage may be a step ahead."""
    block = TrainerBlock(learning_rate=_RATE, lr_scheduler_type="constant", per_device_train_batch_size=12)
    for stage, dtype in ((0, "bfloat16"), (2, "bfloat16"), (0, "float32")):
        group = _group(tiny_llama, block.model_copy(update={"zero_stage": stage}), LORA, dtype)
        list(group.train(group.with_reference(_preferences(12), seed=0, rounds_done=0), seed=0))
        folder = Path(tiny_llama) / f"adapter-{stage}-{dtype}"
        group.save_adapter(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
        updates = [value.float().abs() for name, value in tensors.items() if "lora_B" in name]
        assert updates
        for update in updates:
            assert update.median().item() == pytest.approx(_RATE, rel=0.01)
        for handle in group.handles:
            ray.kill(handle)


def test_dead_rank_is_an_error_not_a_hang(tiny_llama: str) -> None:
    group = _group(tiny_llama, TrainerBlock(ranks=2, per_device_train_batch_size=2), LORA)
    preferences = group.with_reference(_preferences(8), seed=0, rounds_done=0)
    ray.kill(group.handles[1])
    with pytest.raises(TrainerError, match="died|Connection|closed|reset"):
        list(group.train(preferences, seed=0))
    ray.kill(group.handles[0])
