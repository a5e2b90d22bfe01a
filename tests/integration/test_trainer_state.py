"""What a trainer saves is all it needs: other ranks, under another ZeRO stage, go on as if nothing had happened."""

import math
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.trainer.group import TrainerGroup, ask_ranks
from actors.trainer.state import StoredTensors
from raylign.config.losses import BcoPairLossBlock
from raylign.config.reference import (
    EmaReferenceBlock,
    InitialReferenceBlock,
    PreviousRoundReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.errors import TrainerError
from raylign.roles import TrainerRank
from raylign.training.memory import TrainerNeeds, size_of
from tests.faults import record
from tests.integration.ranks import LORA, Processes, preferences, spec_of

pytestmark = pytest.mark.slow

ONE: dict[str, Any] = {"per_device_train_batch_size": 4, "adam_epsilon": 1e-6}
TWO: dict[str, Any] = {"ranks": 2, "per_device_train_batch_size": 2, "adam_epsilon": 1e-6}
PAIRS = 12
DONE = 2
PERSISTENT = 100_000
"""Weights of a tensor that DeepSpeed's stage 3 leaves whole, at most."""
METRICS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate")


def begin(group: TrainerGroup, done: list[dict[str, float]]) -> int:
    """Round 2, after a round 1 that nobody trained, so that a reference that follows has something to do."""
    filled = group.with_reference(preferences(PAIRS), seed=4, rounds_done=1)
    return group.begin_round(filled, 4, 1, done)


def held_bytes(group: TrainerGroup) -> list[int]:
    handles: list[Any] = list(group.handles)
    found: list[int] = ray.get([handle.held_bytes.remote() for handle in handles])
    return found


def go_on(
    ranks: Processes, spec: tuple[str, dict[str, Any], dict[str, Any]], folder: Path, **kinds: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Round 2 from step `DONE` on in a fresh group, with the weights at its end."""
    group = ranks.group(spec_of(*spec, **kinds))
    group.load_state(str(folder / "state"))
    count = begin(group, [{}] * DONE)
    steps = [dict(group.train_step()) for _ in range(DONE, count)]
    group.save_weights(str(folder / "weights.safetensors"))
    return steps, load_file(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        pytest.param({}, ONE, ONE, id="full"),
        pytest.param({}, ONE, TWO | {"zero_stage": 3}, id="full-1-rank-to-2-of-zero-3"),
        pytest.param({}, TWO | {"zero_stage": 3}, ONE | {"zero_stage": 2}, id="full-2-ranks-of-zero-3-to-zero-2"),
        pytest.param({"dtype": "bfloat16"}, TWO | {"zero_stage": 1}, TWO | {"zero_stage": 1}, id="bf16-zero-1"),
        pytest.param({"dtype": "bfloat16"}, ONE, ONE, id="bf16-zero-0"),
        pytest.param({"lora": LORA}, TWO | {"zero_stage": 2}, ONE, id="lora-2-ranks-of-zero-2-to-1-rank"),
        pytest.param(
            {"lora": LORA},
            ONE,
            ONE | {"zero_stage": 2, "offload": {"optimizer": True}},
            id="lora-to-zero-2-with-offload",
        ),
        pytest.param({"lora": LORA, "load_in_4bit": True}, ONE, ONE | {"zero_stage": 2}, id="qlora-to-zero-2"),
        pytest.param({"lora": LORA, "dtype": "float16"}, ONE, ONE, id="lora-float16"),
    ],
)
def test_a_saved_state_goes_on_the_same(
    ranks_llama: str,
    ranks: Processes,
    tmp_path: Path,
    model: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    group = ranks.group(spec_of(ranks_llama, model, before))
    count = begin(group, [])
    first = [dict(group.train_step()) for _ in range(DONE)]
    assert group.save_state(str(tmp_path / "state"), 2) == first
    expected = [dict(group.train_step()) for _ in range(DONE, count)]
    group.save_weights(str(tmp_path / "expected.safetensors"))
    steps, weights = go_on(ranks, (ranks_llama, model, after), tmp_path)
    same = before == after
    for found, wanted in zip(steps, expected, strict=True):
        for name in METRICS:
            assert found[name] == (wanted[name] if same else pytest.approx(wanted[name], rel=2e-4, abs=2e-5)), name
    wanted_weights = load_file(tmp_path / "expected.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, wanted_weights[name], rtol=0 if same else 1e-3, atol=0 if same else 1e-4, msg=name
        )
    # The state matters: a fresh group, as the first one was, takes other steps.
    assert first[0]["loss"] != pytest.approx(expected[0]["loss"], abs=1e-4)
    if before == TWO | {"zero_stage": 3}:
        record(
            "resume on fewer ranks and another ZeRO stage",
            "2 ranks of ZeRO 3 saved, 1 rank of ZeRO 2 loaded",
            lost="nothing: the next steps are the same",
        )


@pytest.mark.parametrize(
    ("model", "block"),
    [
        pytest.param({"dtype": "bfloat16"}, ONE, id="bf16-zero-0"),
        pytest.param({"dtype": "bfloat16"}, TWO | {"zero_stage": 1}, id="bf16-zero-1"),
        pytest.param({"dtype": "bfloat16"}, TWO | {"zero_stage": 2}, id="bf16-zero-2"),
        pytest.param({}, TWO | {"zero_stage": 3}, id="zero-3"),
        pytest.param({"dtype": "bfloat16", "lora": LORA, "load_in_4bit": True}, ONE, id="qlora"),
    ],
)
def test_who_leaves_the_device_between_steps_takes_the_same(
    ranks_llama: str, ranks: Processes, model: dict[str, Any], block: dict[str, Any]
) -> None:
    """The device is the CPU here: what leaves it is gone from it all the same, and comes back where it was."""
    ids = [[3, 4, 5, 6], [7, 8, 9]]
    group = ranks.group(spec_of(ranks_llama, model, block))
    count = begin(group, [])
    expected = [dict(group.train_step()) for _ in range(count)]
    logps = group.token_logps(ids)
    group = ranks.group(spec_of(ranks_llama, model, block))
    begin(group, [])
    found = []
    for _ in range(count):
        before = held_bytes(group)
        ask_ranks(group.handles, 60, "leaving", TrainerRank.offload, keep_weights=False)
        after = held_bytes(group)
        assert all(left < 0.01 * held for left, held in zip(after, before, strict=True)), (before, after)
        ask_ranks(group.handles, 60, "coming back", TrainerRank.reload, weights_alone=False)
        found.append(dict(group.train_step()))
    assert found == expected
    ask_ranks(group.handles, 60, "leaving", TrainerRank.offload, keep_weights=False)
    ask_ranks(group.handles, 60, "coming back", TrainerRank.reload, weights_alone=True)
    assert group.token_logps(ids) == logps
    kept, whole = held_bytes(group)[0], before[0]
    assert kept > 0 and (kept < whole or "lora" in model), "adapters of tiny models are too small to be moved"
    ask_ranks(group.handles, 60, "coming back", TrainerRank.reload, weights_alone=False)


@pytest.mark.parametrize(
    ("model", "stage", "kept"),
    [
        pytest.param({"dtype": "bfloat16"}, 0, 0, id="bf16-zero-0"),
        pytest.param({"dtype": "bfloat16"}, 1, 4, id="bf16-zero-1"),
        pytest.param({"dtype": "bfloat16"}, 2, 0, id="bf16-zero-2"),
        pytest.param({"dtype": "bfloat16"}, 3, 2, id="bf16-zero-3"),
        pytest.param({"dtype": "bfloat16", "lora": {"r": 64}}, 2, 0, id="lora-zero-2"),
    ],
)
def test_ranks_hold_what_a_plan_says(
    ranks_llama: str, ranks: Processes, model: dict[str, Any], stage: int, kept: int
) -> None:
    """Between two steps. Of the gradients `kept` bytes a trained weight are there then; the others come and go.

    At stage 3 DeepSpeed also keeps its bucket, and small weights of policy and reference whole: buffers, in the plan.
    """
    spec = spec_of(ranks_llama, model, TWO | {"zero_stage": stage})
    policy = AutoModelForCausalLM.from_pretrained(ranks_llama)
    config, shapes = policy.config, {name: tuple(weight.shape) for name, weight in policy.named_parameters()}
    size = size_of(shapes, config)
    trained = size.parameters if spec.model.lora is None else spec.model.lora.r * size.sides
    reference = 0 if spec.model.lora else size.parameters * spec.model.itemsize // (2 if stage == 3 else 1)
    rows = TrainerNeeds(size, trained, spec.model, spec.trainer, 16, 2, reference, "cpu").rows()
    group = ranks.group(spec)
    begin(group, [])
    group.train_step()
    held = held_bytes(group)
    expected = sum(rows[name] for name in ("weights", "fp32 masters", "moments", "reference")) + kept * trained
    if stage == 3:
        small = sum(math.prod(shape) for shape in shapes.values() if math.prod(shape) <= PERSISTENT)
        expected += (trained + 2 * small) * spec.model.itemsize
    assert held == [pytest.approx(expected, rel=0.05)] * 2
    assert rows["gradients"] >= kept * trained


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "reference", [EmaReferenceBlock(alpha=0.5), PreviousRoundReferenceBlock()], ids=["ema", "previous"]
)
def test_references_that_follow_go_on_too(
    ranks_llama: str, ranks: Processes, tmp_path: Path, reference: Any, lora: dict[str, int] | None, stage: int
) -> None:
    """The reference has taken its part of the policy before the state is saved; it must not take it again."""
    spec = (ranks_llama, {"lora": lora}, TWO | {"zero_stage": stage})
    kinds = {"reference": reference}
    group = ranks.group(spec_of(*spec, **kinds))
    list(group.train(group.with_reference(preferences(PAIRS), seed=3, rounds_done=0), 3, 0))
    count = begin(group, [])
    for _ in range(DONE):
        group.train_step()
    group.save_state(str(tmp_path / "state"), 2)
    rest = [dict(group.train_step()) for _ in range(DONE, count)]
    third = group.with_reference(preferences(PAIRS), seed=5, rounds_done=2)

    again = ranks.group(spec_of(*spec, **kinds))
    again.load_state(str(tmp_path / "state"))
    # The reference of round 2 is in the saved state, so that its log-probs are the recorded ones.
    begin(again, [{}] * DONE)
    assert [dict(again.train_step()) for _ in range(DONE, count)] == rest
    found = again.with_reference(preferences(PAIRS), seed=5, rounds_done=2)
    assert [p.reference_logps for p in found] == [p.reference_logps for p in third]


def test_running_means_of_a_loss_go_on(ranks_llama: str, ranks: Processes, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"loss": BcoPairLossBlock(beta=0.1)}
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA}, ONE, **kinds))
    count = begin(group, [])
    for _ in range(DONE):
        group.train_step()
    group.save_state(str(tmp_path / "state"), 2)
    rest = [dict(group.train_step()) for _ in range(DONE, count)]
    assert go_on(ranks, (ranks_llama, {"lora": LORA}, ONE), tmp_path, **kinds)[0] == rest


def test_warm_up_and_decay_go_on(ranks_llama: str, ranks: Processes, tmp_path: Path) -> None:
    """Warm-up has ended before the state is saved, in the middle of round 2 of 10, and the decay counts from there."""
    trainer = ONE | {"lr_scheduler_type": "linear", "warmup_steps": 1, "learning_rate": 0.026}
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA}, trainer))
    count = begin(group, [])
    first = [dict(group.train_step()) for _ in range(DONE)]
    group.save_state(str(tmp_path / "state"), 2)
    rest = [dict(group.train_step()) for _ in range(DONE, count)]
    # Round 2 begins at the place 1, and takes 3 steps: warm-up ends at 4/3, and 26/3 are left.
    assert [step["learning_rate"] for step in (*first, *rest)] == pytest.approx([0.0, 0.026, 0.025])
    assert go_on(ranks, (ranks_llama, {"lora": LORA}, trainer), tmp_path)[0] == rest


def test_a_state_of_another_adapter_is_refused(ranks_llama: str, ranks: Processes, tmp_path: Path) -> None:
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA}, ONE))
    group.save_state(str(tmp_path / "state"), 1)
    whole = ranks.group(spec_of(ranks_llama, {}, ONE, reference=InitialReferenceBlock()))
    with pytest.raises(TrainerError, match="it is of another model or adapter"):
        whole.load_state(str(tmp_path / "state"))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_masters_are_the_checkpoint_before_the_first_step(
    ranks_llama: str, ranks: Processes, tmp_path: Path, dtype: str, stage: int
) -> None:
    """Weight decay of 10 at a rate of 0.01 would take a tenth off."""
    trainer = ONE | {"weight_decay": 10.0, "zero_stage": stage}
    group = ranks.group(spec_of(ranks_llama, {"dtype": dtype}, trainer, reference=SamplerReferenceBlock()))
    group.save_state(str(tmp_path / "state"), 0)
    found = StoredTensors(tmp_path / "state")
    checkpoint = load_file(Path(ranks_llama) / "model.safetensors")
    assert found.names() == {f"weights/{name}" for name in checkpoint}
    for name, weight in checkpoint.items():
        assert torch.equal(found.get(f"weights/{name}"), weight.to(getattr(torch, dtype)).float()), name


def test_64_micro_batches_add_up_in_fp32(ranks_llama: str, ranks: Processes, tmp_path: Path) -> None:
    """After one step Adam's first moment is a tenth of the gradient: one and the same sum of bf16 gradients."""

    def moments(**options: Any) -> dict[str, torch.Tensor]:
        shape = {"per_device_train_batch_size": 1, "max_grad_norm": 0.0, **options}
        spec = spec_of(ranks_llama, {"dtype": "bfloat16"}, shape, reference=SamplerReferenceBlock())
        group = ranks.group(spec)
        filled = group.with_reference(preferences(64), seed=4, rounds_done=0)
        assert group.begin_round(filled, 4, 0, []) == 1
        group.train_step()
        folder = tmp_path / "-".join(map(str, options.values()))
        group.save_state(str(folder), 1)
        stored = StoredTensors(folder)
        return {name: stored.get(name) for name in stored.names() if name.startswith("exp_avg/")}

    sharded = moments(gradient_accumulation_steps=64, zero_stage=2)
    alone = moments(gradient_accumulation_steps=64)
    together = moments(gradient_accumulation_steps=32, ranks=2)
    assert alone.keys() == together.keys() == sharded.keys() and sharded
    for name, moment in sharded.items():
        for found in (alone[name], together[name]):
            assert (found - moment).norm() < 1e-5 * moment.norm(), name
