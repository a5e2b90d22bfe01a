"""GRPO on real DeepSpeed ranks: ratios to the round's first policy, one step whatever the micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from actors.trainer.group import TrainerGroup
from raylign.config.losses import GrpoLossBlock
from raylign.config.reference import NoReferenceBlock
from raylign.errors import TrainerError
from raylign.records import Candidate, Preference, Prompt
from raylign.run.checkpoints import Metrics
from tests.integration.ranks import Processes, spec_of, train_round

pytestmark = pytest.mark.slow

GROUPS, SIZE = 12, 4
BASELINE: dict[str, Any] = {"per_device_train_batch_size": 4, "adam_epsilon": 1e-6, "learning_rate": 5e-3}
HALVES = {"ranks": 2, "per_device_train_batch_size": 2}
SAME_STEPS: dict[str, dict[str, Any]] = {
    "4 times 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padded": {"packing": "padded"},
    "2 ranks, micro-batches of 60 tokens": HALVES | {"max_tokens_per_micro_batch": 60},
    "2 ranks, ZeRO 3": HALVES | {"zero_stage": 3},
    # Groups of 14 to 26 tokens: ranks have different numbers of pieces.
    "groups in pieces": {"max_tokens_per_micro_batch": 13},
    "2 ranks, groups in pieces": HALVES | {"max_tokens_per_micro_batch": 13},
    "2 ranks, ZeRO 1, groups in pieces": HALVES | {"zero_stage": 1, "max_tokens_per_micro_batch": 13},
    "2 ranks, ZeRO 2, groups in pieces": HALVES | {"zero_stage": 2, "max_tokens_per_micro_batch": 13},
    "2 ranks, ZeRO 3, groups in pieces": HALVES
    | {"zero_stage": 3, "max_tokens_per_micro_batch": 13, "gradient_checkpointing": True},
}
LOSSES: dict[str, dict[str, Any]] = {
    "grpo with a KL term": {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
}
METRICS = ("loss", "grad_norm", "rewards/margins", "clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean")


def sampled_groups(group: TrainerGroup) -> list[Preference]:
    """Groups of four and of three completions, sampled with the log-probs that the trainers' policy gives them."""
    tokens = (1000 + 3 * step for step in count())
    drawn = []
    for index in range(GROUPS):
        prompt = Prompt(f"p{index}", (), tuple(next(tokens) for _ in range(5)))
        answers = [tuple(next(tokens) for _ in range(3 + (index + i) % 4)) for i in range(SIZE - index % 2)]
        drawn.append((prompt, answers))
    rows = [(*prompt.token_ids, *answer) for prompt, answers in drawn for answer in answers]
    logps = iter(group.token_logps(rows))
    made = []
    for index, (prompt, answers) in enumerate(drawn):
        candidates = tuple(
            Candidate(prompt.id, i, answer, tuple(next(logps)[len(prompt.token_ids) - 1 :]), "", "stop", 0, 0)
            for i, answer in enumerate(answers)
        )
        scores = tuple(float(index % 5 - i) for i in range(len(answers)))
        made.append(Preference(prompt, candidates, scores, (1.0,) * len(answers)))
    return made


def group_for(ranks: Processes, folder: str, loss: dict[str, Any], options: dict[str, Any]) -> TrainerGroup:
    block = GrpoLossBlock.model_validate(loss)
    reference = None if block.needs_reference else NoReferenceBlock()
    spec = spec_of(folder, {}, {**BASELINE, **options}, loss=block, reference=reference)
    return ranks.group(replace(spec, max_completion_tokens=8))


def trajectory(ranks: Processes, folder: str, loss: dict[str, Any], options: dict[str, Any]) -> list[Metrics]:
    group = group_for(ranks, folder, loss, options)
    return train_round(group, sampled_groups(group))


@pytest.fixture(scope="module")
def baselines(ranks_llama: str, ranks: Processes) -> dict[str, list[Metrics]]:
    return {name: trajectory(ranks, ranks_llama, loss, {}) for name, loss in LOSSES.items()}


def test_the_first_step_finds_the_policy_that_sampled_and_later_ones_leave_it(
    baselines: dict[str, list[Metrics]],
) -> None:
    """Advantages of a group add up to 0, and so does the loss of a grpo whose ratios are 1."""
    for name, steps in baselines.items():
        assert len(steps) == GROUPS // BASELINE["per_device_train_batch_size"]
        assert steps[0]["rewards/margins"] == 0.0 and steps[0]["clip_ratio/region_mean"] == 0.0
        assert steps[0]["sampling/sampling_logp_difference/mean"] == pytest.approx(0.0, abs=1e-5)
        assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert steps[0]["grad_norm"] > 0
        if name in ("grpo with a KL term", "gspo"):
            assert steps[0]["loss"] == pytest.approx(0.0, abs=1e-6)
        assert abs(steps[-1]["rewards/margins"]) > 1e-3
    assert baselines["grpo with a KL term"][0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert baselines["grpo with a KL term"][-1]["kl"] > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", SAME_STEPS.values(), ids=SAME_STEPS)
def test_same_trajectory(
    ranks_llama: str, ranks: Processes, baselines: dict[str, list[Metrics]], options: dict[str, Any], name: str
) -> None:
    found = trajectory(ranks, ranks_llama, LOSSES[name], options)
    for step, (left, right) in enumerate(zip(baselines[name], found, strict=True)):
        for metric in (*METRICS, *(["kl"] if "kl" in left else [])):
            assert right[metric] == pytest.approx(left[metric], rel=5e-4, abs=2e-5), (step, metric)


def rest_of_the_round(group: TrainerGroup, filled: Sequence[Preference], done: Sequence[Metrics] = ()) -> list[Metrics]:
    return [group.train_step() for _ in range(len(done), group.begin_round(filled, 3, 0, done))]


def test_a_round_that_goes_on_elsewhere_keeps_the_policy_that_it_began_with(
    ranks_llama: str, ranks: Processes, tmp_path: Path
) -> None:
    """Ratios of the second step are to the policy before the first one, which is gone by then."""
    loss = LOSSES["grpo with a KL term"]
    group = group_for(ranks, ranks_llama, loss, {})
    filled = group.with_reference(sampled_groups(group), seed=3, rounds_done=0)
    assert [len(values) for values in filled[0].old_logprobs] == [len(c.token_ids) for c in filled[0].candidates]
    count_ = group.begin_round(filled, 3, 0, ())
    first = group.train_step()
    group.save_state(str(tmp_path / "state"), 1)
    whole = [first, *(group.train_step() for _ in range(1, count_))]
    again = group_for(ranks, ranks_llama, loss, HALVES)
    again.load_state(str(tmp_path / "state"))
    for left, right in zip(whole[1:], rest_of_the_round(again, filled, [first]), strict=True):
        for metric in METRICS:
            assert right[metric] == pytest.approx(left[metric], rel=5e-4, abs=2e-5), metric
    lost = [replace(one, old_logprobs=()) for one in filled]
    with pytest.raises(TrainerError, match="has the round's first policy's log-probs for"):
        again.begin_round(lost, 3, 0, [first])


def test_a_round_of_one_step_needs_no_pass_of_its_own(ranks_llama: str, ranks: Processes) -> None:
    group = group_for(ranks, ranks_llama, LOSSES["dapo"], {"gradient_accumulation_steps": 3})
    filled = group.with_reference(sampled_groups(group), seed=3, rounds_done=0)
    assert all(one.old_logprobs == () for one in filled)
    (step,) = rest_of_the_round(group, filled)
    assert step["rewards/margins"] == 0.0 and step["grad_norm"] > 0
