"""Real DeepSpeed ranks in Ray actors: ZeRO stage, ranks, accumulation, offload and layout change no step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import FalconConfig, FalconForCausalLM

from actors.trainer.state import StoredTensors
from raylign.config.losses import SigmoidLossBlock
from raylign.errors import ActorsLost
from raylign.records import Completions
from raylign.run.checkpoints import Metrics
from tests.integration.ranks import LORA, Processes, preferences, spec_of, train_round

pytestmark = pytest.mark.slow

Steps = list[Metrics]
RATE = 1e-2
STEPS = 4
PAIRS = 10
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA},
    "qlora": {"lora": LORA, "load_in_4bit": True},
}
BASELINE: dict[str, Any] = {"per_device_train_batch_size": 8, "adam_epsilon": 1e-6}
HALVES: dict[str, Any] = {"ranks": 2, "per_device_train_batch_size": 4}
QUARTERS: dict[str, Any] = {"ranks": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
OFFLOAD_ALL = {"optimizer": True, "param": True}
SAME_STEPS: dict[str, dict[str, Any]] = {
    "8 times 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "micro-batches of 40 tokens": {"max_tokens_per_micro_batch": 40},
    "packed": {"packing": "packed"},
    "padded": {"packing": "padded", "gradient_checkpointing": True},
    "ZeRO 2, offload": {"zero_stage": 2, "offload": {"optimizer": True}, "gradient_checkpointing": True},
    "ZeRO 3, offload": {"zero_stage": 3, "offload": OFFLOAD_ALL, "max_tokens_per_micro_batch": 40},
    "2 ranks": HALVES,
    "2 ranks, ZeRO 1": QUARTERS | {"zero_stage": 1},
    "2 ranks, ZeRO 2": HALVES | {"zero_stage": 2, "gradient_checkpointing": True},
    "2 ranks, ZeRO 3": QUARTERS | {"zero_stage": 3},
    "2 ranks, ZeRO 3, offload": HALVES | {"zero_stage": 3, "offload": OFFLOAD_ALL, "gradient_checkpointing": True},
}


def _trajectory(ranks: Processes, folder: str, model: dict[str, Any], options: dict[str, Any]) -> Steps:
    group = ranks.group(
        spec_of(folder, model, {"learning_rate": 2 * RATE, "num_train_epochs": 2, **BASELINE, **options})
    )
    assert ray.get(group.handles[0].layout.remote()) == options.get("packing", "shared")
    return train_round(group, preferences(PAIRS))


@pytest.fixture(scope="module")
def baselines(ranks_llama: str, ranks: Processes) -> dict[str, Steps]:
    """Plain single-rank fp32 trajectories."""
    return {name: _trajectory(ranks, ranks_llama, model, BASELINE) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", SAME_STEPS.values(), ids=SAME_STEPS)
def test_same_trajectory(
    ranks_llama: str, ranks: Processes, baselines: dict[str, Steps], options: dict[str, Any], name: str
) -> None:
    if name == "qlora" and options.get("zero_stage") == 3:
        pytest.skip("4-bit weights cannot be sharded; the config refuses it")
    expected, found = baselines[name], _trajectory(ranks, ranks_llama, MODELS[name], options)
    assert len(expected) == len(found) == STEPS
    for step, (left, right) in enumerate(zip(expected, found, strict=True)):
        for metric in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"):
            assert right[metric] == pytest.approx(left[metric], rel=2e-4, abs=2e-5), (step, metric)


@pytest.mark.parametrize("options", [{}, HALVES, HALVES | {"zero_stage": 3}], ids=["1 rank", "2 ranks", "ZeRO 3"])
def test_log_probs_of_the_policy_as_it_is(ranks_llama: str, ranks: Processes, options: dict[str, Any]) -> None:
    """Row by row, in order, those that the canary gets token by token; training has moved them off the base's."""
    group = ranks.group(spec_of(ranks_llama, MODELS["lora"], {"learning_rate": RATE, **BASELINE, **options}))
    train_round(group, preferences(8))
    rows = [Completions(p.prompt.token_ids, tuple(c.token_ids for c in p.candidates)) for p in preferences(5)]
    pairs = [(row.prompt, own) for row in rows for own in row.completions]
    by_token = group.token_logps([[*prompt, *own] for prompt, own in pairs])
    expected = [sum(logps[len(prompt) - 1 :]) for (prompt, _), logps in zip(pairs, by_token, strict=True)]
    found = [logp for row in group.policy_logps(rows) for logp in row]
    assert found == pytest.approx(expected, abs=1e-3)
    of_base = [sum(own) for row in group.initial_logprobs(rows) for own in row]
    assert found != pytest.approx(of_base, abs=1e-1)


def test_an_architecture_without_packed_rows_takes_the_same_steps_sharded(ranks: Processes, tmp_path: Path) -> None:
    """The start check runs it packed, finds that it cannot, and takes padded rows: on parameters that ZeRO-3 shards."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    found = []
    for options in ({}, {"zero_stage": 3}, HALVES | {"zero_stage": 3}):
        group = ranks.group(spec_of(str(tmp_path), {}, {"learning_rate": RATE, **BASELINE, **options}))
        layouts: list[Any] = ray.get([handle.layout.remote() for handle in group.handles])
        assert set(layouts) == {"padded"}
        found.append(train_round(group, preferences(PAIRS)))
    for steps in found[1:]:
        for step, (left, right) in enumerate(zip(found[0], steps, strict=True)):
            for metric in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
                assert right[metric] == pytest.approx(left[metric], rel=2e-4, abs=2e-5), (step, metric)


def test_first_step_is_ln_2_and_training_learns(baselines: dict[str, Steps]) -> None:
    for steps in baselines.values():
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert steps[0]["rewards/margins"] == 0.0
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
        assert steps[-1]["rewards/accuracies"] > 0.9


@pytest.mark.parametrize(("dtype", "limit", "sharded"), [("bfloat16", 5e-3, 1e-2), ("float16", 2e-3, 2e-3)])
def test_half_precision_starts_at_ln_2_and_stages_agree(
    ranks_llama: str, ranks: Processes, baselines: dict[str, Steps], dtype: str, limit: float, sharded: float
) -> None:
    """On one shape of batch, which decides how they round; stage 3 rounds like PEFT, whose layers it keeps."""
    for name in ("lora", "qlora"):
        model = MODELS[name] | {"dtype": dtype}
        stages = (0, 1, 2, 3) if name == "lora" else (0, 2)
        found = [_trajectory(ranks, ranks_llama, model, {"zero_stage": stage}) for stage in stages]
        for steps in found:
            assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
        for stage, steps in zip(stages, found, strict=True):
            for step, first in zip(steps, found[0], strict=True):
                assert step["loss"] == pytest.approx(first["loss"], abs=sharded if stage == 3 else limit)
                assert step["grad_norm"] == pytest.approx(first["grad_norm"], rel=0.05)
                assert step.get("skipped_steps") == (0.0 if dtype == "float16" else None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        HALVES | {"zero_stage": 1},
        HALVES | {"zero_stage": 2},
        HALVES | {"zero_stage": 3},
        SAME_STEPS["ZeRO 2, offload"],
    ],
    ids=["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 2, offload"],
)
def test_steps_far_below_those_of_bf16_reach_the_published_weights(
    ranks_llama: str, ranks: Processes, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The published weights move as far as the fp32 ones, by least squares; rounded to the nearest, next to nothing."""
    spec = spec_of(ranks_llama, {"dtype": "bfloat16"}, BASELINE | {"learning_rate": 1e-5} | options)
    group = ranks.group(spec)
    group.save_weights(str(tmp_path / "before.safetensors"))
    train_round(group, preferences(PAIRS))
    group.save_weights(str(tmp_path / "after.safetensors"))
    group.save_state(str(tmp_path / "state"), 1)
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    stored = StoredTensors(tmp_path / "state")
    names = [name.removeprefix("weights/") for name in stored.names() if name.startswith("weights/")]
    assert set(names) == set(after)
    exact = torch.cat([(stored.get(f"weights/{name}") - before[name].float()).flatten() for name in names])
    published = torch.cat([(after[name].float() - before[name].float()).flatten() for name in names])
    assert float(published.double() @ exact.double() / exact.double().square().sum()) == pytest.approx(1, abs=0.15)


def test_weights_of_preferences_scale_loss_and_gradient(ranks_llama: str, ranks: Processes) -> None:
    """Before its first update every pair loses ln 2: weights of 0.5 and 2.5 make that 1.5 ln 2, doubled 3 ln 2."""

    def first_step(options: dict[str, Any], factor: float) -> Metrics:
        group = ranks.group(spec_of(ranks_llama, MODELS["lora"], BASELINE | options))
        pairs = [replace(p, weights=(factor * (0.5 + 2 * (i % 2)),) * 2) for i, p in enumerate(preferences(8))]
        return train_round(group, pairs)[0]

    once, doubled = first_step({}, 1), first_step(HALVES, 2)
    assert once["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-5)
    for metric in ("loss", "grad_norm"):
        assert doubled[metric] == pytest.approx(2 * once[metric], rel=2e-4)


def test_adam_matches_torch(ranks_llama: str, ranks: Processes) -> None:
    """Step 1 of Adam moves every trained weight by the learning rate: no stage may be a step ahead."""
    for stage, dtype in ((0, "bfloat16"), (2, "bfloat16"), (0, "float32"), (0, "float16")):
        options = {"learning_rate": RATE, "zero_stage": stage, "per_device_train_batch_size": 12}
        group = ranks.group(spec_of(ranks_llama, {"lora": LORA, "dtype": dtype}, options))
        train_round(group, preferences(12))
        folder = Path(ranks_llama) / f"adapter-{stage}-{dtype}"
        group.save_adapter(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
        updates = [value.float().abs() for name, value in tensors.items() if "lora_B" in name]
        assert updates
        for update in updates:
            assert update.median().item() == pytest.approx(RATE, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"ranks": 2, "zero_stage": 2}], ids=["1 rank", "2 ranks, ZeRO 2"])
def test_float16_skips_overflowed_steps_until_its_loss_scale_fits(
    ranks_llama: str, ranks: Processes, options: dict[str, Any]
) -> None:
    schedule = {"lr_scheduler_type": "linear", "per_device_train_batch_size": 1}
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA, "dtype": "float16"}, schedule | options))
    ray.get([handle.set_loss_scale.remote(2.0**20) for handle in group.handles])
    steps = train_round(group, preferences(12))
    first, applied = [step["skipped_steps"] for step in steps].index(0.0), 0
    for number, step in enumerate(steps):
        # Of a run of 10 such rounds; the decay begins with the first step that is taken.
        decayed = max(0, number - first) / (10 * len(steps) - first)
        assert step["learning_rate"] == pytest.approx(RATE * (1 - decayed))
        assert applied or step["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert math.isfinite(step["grad_norm"]) if step["skipped_steps"] == 0.0 else "grad_norm" not in step
        applied += step["skipped_steps"] == 0.0
    assert 0 < applied < len(steps)


@pytest.mark.parametrize(
    ("dtype", "stage", "beta"),
    [("float16", 0, 1e8), ("float32", 0, 1e38), ("float32", 2, 1e38), ("bfloat16", 0, 1e38), ("bfloat16", 2, 1e38)],
)
def test_an_overflow_that_no_scale_can_cure_is_skipped_and_counted(
    ranks_llama: str, ranks: Processes, dtype: str, stage: int, beta: float, tmp_path: Path
) -> None:
    spec = spec_of(ranks_llama, {"lora": LORA, "dtype": dtype}, {"zero_stage": stage}, loss=SigmoidLossBlock(beta=beta))
    group = ranks.group(spec)
    if dtype == "float16":
        ray.get(group.handles[0].set_loss_scale.remote(1.0))
    group.save_adapter(str(tmp_path / "before"))
    steps = train_round(group, preferences(4))
    assert steps and all(step["non_finite_steps"] == step["skipped_steps"] == 1.0 for step in steps)
    group.save_adapter(str(tmp_path / "after"))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_dead_rank_is_an_error_not_a_hang(ranks_llama: str, ranks: Processes) -> None:
    """The last test of those that share ranks: it uses up the group of two."""
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA}, {"ranks": 2, "per_device_train_batch_size": 2}))
    pairs = group.with_reference(preferences(8), seed=0, rounds_done=0)
    ray.kill(group.handles[1])
    with pytest.raises(ActorsLost, match="died"):
        list(group.train(pairs, seed=0))
    ranks.end(2)
