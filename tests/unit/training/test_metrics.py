"""TRL's metrics from two micro-batches, one of them a filler, against means worked out by hand."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from raylign.losses import LossOutput
from raylign.records import Candidate, Preference, Prompt
from raylign.training.kernels.head import TokenScores
from raylign.training.logprobs import CompletionScores
from raylign.training.metrics import NAMES, finish, sums
from raylign.training.preferences import PreferenceBatch, preference_batch

TRL = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
}


OF_ONE = {"loss", "logps/chosen", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"}
"""What a demonstration has as well."""


def batch_of(*groups: Sequence[int], weights: Sequence[float] | None = None, prompt: int = 4) -> PreferenceBatch:
    """One preference per group of completion lengths, best first, behind prompts of `prompt` tokens."""
    preferences = [
        Preference(
            Prompt("p", (), (1,) * prompt),
            tuple(Candidate("p", i, (2,) * length, (), "", "stop", 0, 0) for i, length in enumerate(lengths)),
            (0.0,) * len(lengths),
            (1.0,) * len(lengths),
        )
        for lengths in groups
    ]
    return preference_batch(preferences, weights or [1.0] * len(groups), "shared", 0)


def loss_of(
    losses: Sequence[float],
    chosen: Sequence[float],
    rejected: Sequence[float],
    own: Mapping[str, Sequence[float]] | None = None,
) -> LossOutput:
    metrics = {name: torch.tensor(values) for name, values in (own or {}).items()}
    return LossOutput(torch.tensor(losses), torch.tensor(chosen), torch.tensor(rejected), metrics)


def scores_of(
    batch: PreferenceBatch,
    logps: Sequence[float],
    entropies: Sequence[float],
    correct: Sequence[float],
    mean_logits: Sequence[float],
) -> CompletionScores:
    """`logps` per completion, the others per token."""
    none = torch.zeros(len(entropies))
    tokens = TokenScores(none, torch.tensor(entropies), torch.tensor(correct), torch.tensor(mean_logits), none)
    return CompletionScores(torch.tensor(logps), tokens, batch.tokens.owners)


def first() -> torch.Tensor:
    """A pair of 2 and 1 tokens and a list of 1, 2 and 3 tokens: 2 * 4 + 3 + 3 * 4 + 6 = 29 with prompts."""
    batch = batch_of((2, 1), (1, 2, 3))
    scores = scores_of(
        batch,
        logps=[-2.0, -1.0, -4.0, -99.0, -9.0],
        entropies=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        correct=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0],
        mean_logits=[0.1, 0.2, -1.0, 0.6, 77.0, 88.0, -2.0, -3.0, -6.0],
    )
    return sums(loss_of([0.5, 0.9], [0.3, -0.1], [-0.2, 0.4]), scores, batch)


def second() -> torch.Tensor:
    """A pair of 1 and 1 token behind a prompt of 3; chosen and rejected reward are equal."""
    batch = batch_of((1, 1), prompt=3)
    scores = scores_of(batch, [-3.0, -5.0], entropies=[8.0, 9.0], correct=[1.0, 1.0], mean_logits=[3.1, 4.0])
    return sums(loss_of([0.7], [0.1], [0.1]), scores, batch)


def filler() -> torch.Tensor:
    """A pair of weight 0 with values that would show."""
    batch = batch_of((2, 1), weights=[0.0])
    scores = scores_of(batch, [-1e6, -1e6], [1e6] * 3, [1.0] * 3, [1e6] * 3)
    return sums(loss_of([1e6], [1e6], [-1e6]), scores, batch)


EXPECTED = {  # of `first` and `second`: 3 preferences; 11 tokens, 4 of them of the best, 5 of the worst candidate
    "loss": (0.5 + 0.9 + 0.7) / 3,
    "rewards/chosen": (0.3 - 0.1 + 0.1) / 3,
    "rewards/rejected": (-0.2 + 0.4 + 0.1) / 3,
    "rewards/margins": (0.5 - 0.5 + 0.0) / 3,
    "rewards/accuracies": 1 / 3,  # an equal reward is not an accurate one
    "logps/chosen": (-2 - 4 - 3) / 3,
    "logps/rejected": (-1 - 9 - 5) / 3,
    "entropy": (45 + 17) / 11,
    "mean_token_accuracy": (5 + 2) / 11,
    "logits/chosen": (0.1 + 0.2 + 0.6 + 3.1) / 4,
    "logits/rejected": (-1 - 2 - 3 - 6 + 4) / 5,
    "num_tokens": 29 + 2 * 3 + 2,
}


def test_the_names_are_those_of_trl() -> None:
    assert set(NAMES) == TRL == set(finish(first()))


def test_two_micro_batches_and_a_filler_by_hand() -> None:
    assert finish(first() + second() + filler()) == pytest.approx(EXPECTED, abs=1e-6)


def test_a_filler_adds_nothing() -> None:
    assert filler().tolist() == [0.0] * (len(NAMES) + 5)


def test_a_rank_of_fillers_alone_divides_by_no_zero() -> None:
    assert finish(filler()) == dict.fromkeys(OF_ONE, 0.0)


def test_a_demonstration_has_no_metrics_of_pairs() -> None:
    """One candidate of 3 tokens behind a prompt of 4; beside a pair it changes none of the pair's means."""
    batch = batch_of((3,))
    scores = scores_of(batch, [-6.0], entropies=[1.0, 2.0, 6.0], correct=[1.0, 0.0, 1.0], mean_logits=[0.1, 0.2, 0.6])
    alone = sums(loss_of([2.0], [9.0], [9.0]), scores, batch)
    expected = {"loss": 2.0, "logps/chosen": -6.0, "entropy": 3.0, "mean_token_accuracy": 2 / 3, "num_tokens": 7.0}
    assert finish(alone) == pytest.approx(expected | {"logits/chosen": 0.3}, abs=1e-6)
    both, pair = finish(alone + second()), finish(second())
    of_pairs = set(NAMES) - OF_ONE
    assert {name: both[name] for name in of_pairs} == {name: pair[name] for name in of_pairs}
    assert both["loss"] == pytest.approx((2.0 + 0.7) / 2) and both["logps/chosen"] == (-6.0 - 3.0) / 2


def test_a_pair_without_weight_inside_a_micro_batch_counts_nowhere() -> None:
    batch = batch_of((1, 1), (1, 1), weights=[1.0, 0.0])
    scores = scores_of(
        batch, [-2.0, -3.0, -90.0, -90.0], [1.0, 2.0, 90.0, 90.0], [1.0, 0.0, 1.0, 1.0], [0.5, 0.7, 90.0, 90.0]
    )
    found = finish(sums(loss_of([0.5, 9.0], [0.3, 9.0], [0.1, -9.0]), scores, batch))
    assert found["loss"] == pytest.approx(0.5) and found["rewards/margins"] == pytest.approx(0.2)
    assert (found["logps/chosen"], found["logps/rejected"]) == (-2.0, -3.0)
    assert (found["entropy"], found["mean_token_accuracy"]) == (1.5, 0.5)
    assert (found["logits/chosen"], found["logits/rejected"]) == pytest.approx((0.5, 0.7))
    assert found["num_tokens"] == 2 * 4 + 2


def test_weights_of_preferences_scale_the_loss_alone() -> None:
    """Weights 1.5 and 0.5 with losses 0.4 and 0.8: (0.6 + 0.4) / 2."""
    scores_by = {"logps": [-2.0, -3.0, -4.0, -7.0], "entropies": [1.0, 2.0, 3.0, 4.0]}
    found = {}
    for name, weights in (("weighted", [1.5, 0.5]), ("plain", [1.0, 1.0])):
        batch = batch_of((1, 1), (1, 1), weights=weights)
        scores = scores_of(batch, **scores_by, correct=[1.0, 0.0, 1.0, 0.0], mean_logits=[0.5, 0.7, 0.9, 1.1])
        loss = loss_of([0.4, 0.8], [0.3, 0.5], [0.1, 0.7], {"kl": [1.0, 3.0]})
        found[name] = finish(sums(loss, scores, batch), ("kl",))
    assert found["weighted"].pop("loss") == pytest.approx(0.5) and found["plain"].pop("loss") == pytest.approx(0.6)
    assert found["weighted"] == found["plain"]
    assert found["plain"]["kl"] == 2.0 and found["plain"]["logps/chosen"] == -3.0


def test_completions_without_any_token_give_means_of_0() -> None:
    batch = batch_of((0, 0))
    found = finish(sums(loss_of([0.6], [0.0], [0.0]), scores_of(batch, [0.0, 0.0], [], [], []), batch))
    assert found["loss"] == pytest.approx(0.6)
    assert (found["entropy"], found["logits/chosen"], found["num_tokens"]) == (0.0, 0.0, 8.0)


def test_what_a_loss_logs_itself_is_averaged_over_preferences_under_its_name() -> None:
    """Whatever the order in which the loss names them."""
    own = {"kl": [3.0, 50.0], "loss/sft": [1.0, 70.0]}
    batch = batch_of((1, 1), (1, 1), weights=[1.0, 0.0])
    scores = scores_of(batch, [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4)
    forwards = sums(loss_of([0.0] * 2, [0.0] * 2, [0.0] * 2, own), scores, batch)
    backwards = sums(loss_of([0.0] * 2, [0.0] * 2, [0.0] * 2, dict(reversed(own.items()))), scores, batch)
    assert torch.equal(forwards, backwards)
    found = finish(forwards + forwards, own=("loss/sft", "kl"))
    assert (found["kl"], found["loss/sft"]) == (3.0, 1.0)
    assert set(found) == TRL | set(own)


def test_totals_are_detached_float64_and_keep_small_parts_of_large_sums() -> None:
    batch = batch_of((1, 1))
    zeros, live = torch.zeros(2), torch.zeros(2, requires_grad=True)
    tokens = TokenScores(live, live, zeros, zeros, zeros)
    scores = CompletionScores(torch.zeros(2, requires_grad=True), tokens, batch.tokens.owners)
    loss = LossOutput(torch.tensor([0.25], requires_grad=True), torch.zeros(1), torch.zeros(1))
    total = sums(loss, scores, batch)
    assert total.dtype == torch.float64 and total.device.type == "cpu" and not total.requires_grad
    many = total * 2**30 + total
    assert many[0].item() == 0.25 * (2**30 + 1)


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    batch = batch_of((1, 1))
    scores = scores_of(batch, [0.0] * 2, [0.0] * 2, [0.0] * 2, [0.0] * 2)
    broken = sums(loss_of([math.nan], [0.0], [0.0]), scores, batch)
    assert math.isnan(finish(first() + broken)["loss"])
