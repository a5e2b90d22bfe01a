"""KL that losses read, and loss state under a moving reference, over real trainer groups."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from torch import tensor
from torch.nn.functional import logsigmoid

from actors.trainer.group import TrainerGroup
from raylign.config.losses import (
    BcoPairLossBlock,
    KlLossBlock,
    KtoLossBlock,
    LossBlock,
    MixLossBlock,
    SigmoidLossBlock,
)
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
)
from raylign.records import KlSample, Preference
from raylign.run.checkpoints import Metrics
from tests.integration.ranks import Processes, preferences, spec_of, train_round

pytestmark = pytest.mark.slow

SAME = 2e-4
"""Largest difference of the summed log-probs (nats) of a completion that are computed in two ways in float32."""
LORA = {"lora": {"r": 4, "lora_alpha": 8}}
ONE: dict[str, Any] = {"per_device_train_batch_size": 4}
KTO, KL = KtoLossBlock(beta=0.1), MixLossBlock(losses=(SigmoidLossBlock(beta=0.1), KlLossBlock()))
BOTH = MixLossBlock(losses=(KTO, KlLossBlock()), loss_weights=(1.0, 0.1))
BCO = BcoPairLossBlock(beta=0.1, reward_shift_decay=0.5)
LN_4 = pytest.approx(2 * math.log(2), abs=1e-6)


def with_samples(pairs: Sequence[Preference]) -> list[Preference]:
    """Half to the pair's own prompt, half to another one: chosen answers, so that their KL grows in training."""
    found = []
    for number, pair in enumerate(pairs):
        other = pairs[number - number % 2]
        found.append(replace(pair, kl_sample=KlSample(other.prompt.token_ids, other.candidates[0].token_ids, -2.5)))
    return found


PAIRS = with_samples(preferences(8))


def kl_of(group: TrainerGroup, pairs: Sequence[Preference]) -> float:
    """Mean log-ratio of the pairs' KL samples under the policy as it is, one sequence at a time."""
    ratios = []
    for pair in pairs:
        sample = pair.kl_sample
        assert sample is not None and sample.reference_logp is not None
        (logps,) = group.token_logps([(*sample.prompt_token_ids, *sample.token_ids)])
        ratios.append(math.fsum(logps[-len(sample.token_ids) :]) - sample.reference_logp)
    return fmean(ratios)


@pytest.mark.parametrize("loss", [KTO, KL, BOTH], ids=["kto", "kl", "both"])
def test_the_kl_is_that_of_the_policy_as_the_step_finds_it(ranks_llama: str, ranks: Processes, loss: LossBlock) -> None:
    """Of the step's own samples: nothing lags behind. KTO's is not below 0."""
    group = ranks.group(spec_of(ranks_llama, {}, {**ONE, "num_train_epochs": 2}, loss=loss))
    filled = group.with_reference(PAIRS, seed=3, rounds_done=0)
    found, expected = [], []
    for number in range(group.begin_round(filled, 3, 0, ())):
        kl = kl_of(group, [filled[index] for index in group.step_indices(number)])
        expected.append(max(0.0, kl) if loss is KTO else kl)
        found.append(group.train_step()["kl"])
    assert found == pytest.approx(expected, abs=SAME) and abs(expected[-1]) > 0.5
    assert loss is BOTH or found[0] == 0.0


@pytest.mark.parametrize("loss", [KTO, KL, BOTH], ids=["kto", "kl", "both"])
def test_every_layout_micro_batch_and_number_of_ranks_takes_the_same_steps(
    ranks_llama: str, ranks: Processes, loss: LossBlock
) -> None:
    shapes: list[dict[str, Any]] = [
        ONE,
        {**ONE, "packing": "packed"},
        {**ONE, "packing": "padded"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"ranks": 2, "zero_stage": 3, "per_device_train_batch_size": 2},
        # 3 of a batch of 4 in the last step: one rank runs a filler.
        {**ONE, "max_tokens_per_micro_batch": 40},
        {"ranks": 2, "zero_stage": 2, "per_device_train_batch_size": 2, "max_tokens_per_micro_batch": 10},
    ]
    runs = []
    for shape in shapes:
        runs.append(train_round(ranks.group(spec_of(ranks_llama, LORA, shape, loss=loss)), PAIRS[:7]))
    assert runs[0][1]["kl"] > 0.001
    for name in ("loss", "kl", "grad_norm", "entropy", "num_tokens", "logps/chosen", "logps/rejected"):
        for steps in runs[1:]:
            assert [step[name] for step in steps] == pytest.approx([step[name] for step in runs[0]], rel=2e-3, abs=SAME)


@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reference", [PreviousRoundReferenceBlock(), EveryReferenceBlock(n=1)], ids=lambda r: r.policy)
def test_a_round_against_the_policy_itself_starts_at_a_kl_of_0(
    ranks_llama: str, ranks: Processes, model: dict[str, Any], reference: ReferenceBlock
) -> None:
    group = ranks.group(spec_of(ranks_llama, model, {**ONE, "num_train_epochs": 2}, loss=KTO, reference=reference))
    for rounds_done in range(2):
        steps = train_round(group, PAIRS, rounds_done=rounds_done)
        assert steps[0]["kl"] == 0.0 and steps[0]["loss"] == pytest.approx(0.5, abs=1e-6)
        assert steps[-1]["kl"] > 0.01


def test_bcos_shift_is_0_where_the_reference_has_caught_up(ranks_llama: str, ranks: Processes) -> None:
    reference = PreviousRoundReferenceBlock()
    group = ranks.group(spec_of(ranks_llama, {}, {**ONE, "num_train_epochs": 2}, loss=BCO, reference=reference))
    for rounds_done in range(2):
        steps = train_round(group, PAIRS, rounds_done=rounds_done)
        assert steps[0]["loss"] == LN_4 and abs(steps[-1]["reward_shift"]) > 0.01


def test_bcos_shift_is_measured_anew_where_the_reference_has_moved(ranks_llama: str, ranks: Processes) -> None:
    """A step of one pair, so that its metrics are its rewards."""
    trainer = {"per_device_train_batch_size": 1}
    group = ranks.group(spec_of(ranks_llama, LORA, trainer, loss=BCO, reference=EmaReferenceBlock(alpha=0.5)))
    train_round(group, PAIRS)
    first = train_round(group, PAIRS, rounds_done=1)[0]
    shift = (first["rewards/chosen"] + first["rewards/rejected"]) / 2
    assert abs(shift) > 0.01 and first["reward_shift"] == pytest.approx(shift, abs=1e-6)
    gaps = tensor([first["rewards/chosen"] - shift, shift - first["rewards/rejected"]])
    assert first["loss"] == pytest.approx(-logsigmoid(gaps).sum().item(), abs=1e-5)


def test_the_shift_of_a_reference_that_stays_goes_on_through_the_rounds(ranks_llama: str, ranks: Processes) -> None:
    group = ranks.group(spec_of(ranks_llama, LORA, {"per_device_train_batch_size": 1}, loss=BCO))
    shift = 0.0
    for rounds_done in range(2):
        for step in train_round(group, PAIRS, rounds_done=rounds_done):
            gaps = tensor([step["rewards/chosen"] - shift, shift - step["rewards/rejected"]])
            assert step["loss"] == pytest.approx(-logsigmoid(gaps).sum().item(), abs=1e-5)
            shift = (shift + step["reward_shift"]) / 2


@pytest.mark.parametrize("loss", [BCO, KTO], ids=["bco", "kto"])
def test_a_round_resumed_in_the_middle_takes_the_steps_it_would_have_taken(
    ranks_llama: str, ranks: Processes, loss: LossBlock, tmp_path: Path
) -> None:
    spec = spec_of(
        ranks_llama, LORA, {"per_device_train_batch_size": 2}, loss=loss, reference=PreviousRoundReferenceBlock()
    )
    group = ranks.group(spec)
    train_round(group, PAIRS)
    filled = group.with_reference(PAIRS, seed=4, rounds_done=1)
    group.begin_round(filled, 4, 1, ())
    done = [group.train_step(), group.train_step()]
    group.save_state(str(tmp_path / "state"), 2)
    rest = [group.train_step(), group.train_step()]
    again = ranks.group(spec)
    again.load_state(str(tmp_path / "state"))
    again.begin_round(filled, 4, 1, done)
    resumed: list[Metrics] = [again.train_step(), again.train_step()]
    assert [{**step} for step in resumed] == [{**step} for step in rest]


def test_held_out_rows_have_a_kl_of_their_own(ranks_llama: str, ranks: Processes) -> None:
    """Over all of them, whatever the micro-batches; training is not touched."""
    group = ranks.group(spec_of(ranks_llama, {}, {"per_device_train_batch_size": 2}, loss=KTO))
    held_out = with_samples(preferences(12)[8:])
    filled = group.with_reference(held_out, seed=0, rounds_done=0)
    assert group.evaluate(filled).metrics["kl"] == 0.0
    train_round(group, PAIRS)
    assert group.evaluate(filled).metrics["kl"] == pytest.approx(max(0.0, kl_of(group, filled)), abs=SAME)
