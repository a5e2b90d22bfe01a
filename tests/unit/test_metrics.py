"""TRL's metrics from two micro-batches, one of them a filler, against means worked out by hand."""

import math

import pytest
import torch

from raylign.losses import LossOutput
from raylign.training.logprobs import CompletionScores
from raylign.training.metrics import NAMES, finish, sums

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


def first() -> torch.Tensor:
    """Two pairs. Rows 0, 1 are chosen with 2 and 1 tokens, rows 2, 3 rejected with 1 and 3 tokens."""
    loss = LossOutput(torch.tensor([0.5, 0.9]), torch.tensor([0.3, -0.1]), torch.tensor([-0.2, 0.4]))
    scores = CompletionScores(
        logps=torch.tensor([-2.0, -4.0, -1.0, -9.0]),
        token_logps=torch.zeros(7),
        entropies=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
        correct=torch.tensor([True, False, True, False, False, True, False]),
        mean_logits=torch.tensor([0.1, 0.2, 0.6, -1.0, -2.0, -3.0, -6.0]),
        rows=torch.tensor([0, 0, 1, 2, 3, 3, 3]),
    )
    return sums(loss, scores, torch.tensor([1.0, 1.0]), input_tokens=31)


def second() -> torch.Tensor:
    """One pair of 1 chosen and 1 rejected token; chosen and rejected reward are equal."""
    loss = LossOutput(torch.tensor([0.7]), torch.tensor([0.1]), torch.tensor([0.1]))
    scores = CompletionScores(
        logps=torch.tensor([-3.0, -5.0]),
        token_logps=torch.zeros(2),
        entropies=torch.tensor([8.0, 9.0]),
        correct=torch.tensor([True, True]),
        mean_logits=torch.tensor([3.1, 4.0]),
        rows=torch.tensor([0, 1]),
    )
    return sums(loss, scores, torch.tensor([1.0]), input_tokens=9)


def filler() -> torch.Tensor:
    """A pair of weight 0 with values that would show."""
    loss = LossOutput(torch.tensor([1e6]), torch.tensor([1e6]), torch.tensor([-1e6]))
    scores = CompletionScores(
        logps=torch.tensor([-1e6, -1e6]),
        token_logps=torch.zeros(3),
        entropies=torch.full((3,), 1e6),
        correct=torch.tensor([True, True, True]),
        mean_logits=torch.full((3,), 1e6),
        rows=torch.tensor([0, 0, 1]),
    )
    return sums(loss, scores, torch.tensor([0.0]), input_tokens=1000)


EXPECTED = {  # of `first` and `second`: 3 pairs; 9 tokens, 4 of them chosen, 5 rejected
    "loss": (0.5 + 0.9 + 0.7) / 3,
    "rewards/chosen": (0.3 - 0.1 + 0.1) / 3,
    "rewards/rejected": (-0.2 + 0.4 + 0.1) / 3,
    "rewards/margins": (0.5 - 0.5 + 0.0) / 3,
    "rewards/accuracies": 1 / 3,  # an equal reward is not an accurate one
    "logps/chosen": (-2 - 4 - 3) / 3,
    "logps/rejected": (-1 - 9 - 5) / 3,
    "entropy": 45 / 9,
    "mean_token_accuracy": 5 / 9,
    "logits/chosen": (0.1 + 0.2 + 0.6 + 3.1) / 4,
    "logits/rejected": (-1 - 2 - 3 - 6 + 4) / 5,
    "num_tokens": 31 + 9,
}


def test_the_names_are_those_of_trl() -> None:
    assert set(NAMES) == TRL == set(finish(first()))


def test_two_micro_batches_and_a_filler_by_hand() -> None:
    assert finish(first() + second() + filler()) == pytest.approx(EXPECTED, abs=1e-6)


def test_a_filler_adds_nothing() -> None:
    assert filler().tolist() == [0.0] * (len(NAMES) + 4)


def test_a_rank_of_fillers_alone_divides_by_no_zero() -> None:
    assert finish(filler()) == dict.fromkeys(NAMES, 0.0)


def test_a_pair_without_weight_inside_a_micro_batch_counts_nowhere() -> None:
    loss = LossOutput(torch.tensor([0.5, 9.0]), torch.tensor([0.3, 9.0]), torch.tensor([0.1, -9.0]))
    scores = CompletionScores(
        logps=torch.tensor([-2.0, -90.0, -3.0, -90.0]),
        token_logps=torch.zeros(4),
        entropies=torch.tensor([1.0, 90.0, 2.0, 90.0]),
        correct=torch.tensor([True, True, False, True]),
        mean_logits=torch.tensor([0.5, 90.0, 0.7, 90.0]),
        rows=torch.tensor([0, 1, 2, 3]),
    )
    found = finish(sums(loss, scores, torch.tensor([1.0, 0.0]), input_tokens=6))
    assert found["loss"] == pytest.approx(0.5) and found["rewards/margins"] == pytest.approx(0.2)
    assert (found["logps/chosen"], found["logps/rejected"]) == (-2.0, -3.0)
    assert (found["entropy"], found["mean_token_accuracy"]) == (1.5, 0.5)
    assert (found["logits/chosen"], found["logits/rejected"]) == pytest.approx((0.5, 0.7))


def test_completions_without_any_token_give_means_of_0() -> None:
    loss = LossOutput(torch.tensor([0.6]), torch.tensor([0.0]), torch.tensor([0.0]))
    none = torch.zeros(0)
    scores = CompletionScores(torch.zeros(2), none, none, none.bool(), none, none.long())
    found = finish(sums(loss, scores, torch.tensor([1.0]), input_tokens=4))
    assert found["loss"] == pytest.approx(0.6)
    assert (found["entropy"], found["logits/chosen"], found["num_tokens"]) == (0.0, 0.0, 4.0)


def test_totals_are_detached_float64_and_keep_small_parts_of_large_sums() -> None:
    losses = torch.tensor([0.25], requires_grad=True)
    scores = CompletionScores(
        torch.zeros(2, requires_grad=True),
        torch.zeros(2),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2),
        torch.tensor([0, 1]),
    )
    total = sums(LossOutput(losses, torch.zeros(1), torch.zeros(1)), scores, torch.tensor([1.0]), 2)
    assert total.dtype == torch.float64 and not total.requires_grad
    many = total * 2**30 + total
    assert many[0].item() == 0.25 * (2**30 + 1)


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    scores = CompletionScores(
        torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2).bool(), torch.zeros(2), torch.tensor([0, 1])
    )
    broken = sums(LossOutput(torch.tensor([math.nan]), torch.zeros(1), torch.zeros(1)), scores, torch.ones(1), 2)
    assert math.isnan(finish(first() + broken)["loss"])
