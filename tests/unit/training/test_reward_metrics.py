"""A reward model's metrics from two micro-batches and a filler, against means worked out by hand."""

from collections.abc import Sequence

import pytest
import torch

from raylign.losses import LossOutput
from raylign.training.reward_metrics import NAMES, extremes, finish, sums
from tests.unit.training.test_metrics import batch_of, loss_of

Parts = tuple[torch.Tensor, torch.Tensor]


def parts(groups: Sequence[Sequence[int]], rewards: Sequence[float], loss: LossOutput, weight: float = 1.0) -> Parts:
    batch = batch_of(*groups, weights=[weight] * len(groups))
    values = torch.tensor(rewards, requires_grad=True)
    return sums(loss, values, batch), extremes(values, batch)


def test_two_micro_batches_and_a_filler_by_hand() -> None:
    """A pair and a list of three with prompts of 4 tokens, then a pair of equal rewards."""
    first = parts([(2, 1), (1, 2, 3)], [2.0, 1.0, -1.0, 9.0, 3.0], loss_of([0.5, 0.9], [2.0, -1.0], [1.0, 3.0]))
    second = parts([(1, 1)], [-7.0, -7.0], loss_of([0.7], [-7.0], [-7.0]))
    filler = parts([(1, 1)], [1e6, -1e6], loss_of([1e6], [1e6], [-1e6]), weight=0.0)
    totals, highest = zip(first, second, filler, strict=True)
    found = finish(torch.stack(totals).sum(0), torch.stack(highest).amax(0))
    expected = {
        "loss": 2.1 / 3,
        "rewards/chosen": (2 - 1 - 7) / 3,
        "rewards/rejected": (1 + 3 - 7) / 3,
        "rewards/margins": (1 - 4 + 0) / 3,
        "rewards/accuracies": 1 / 3,  # an equal reward is not an accurate one
        "margin": -1.0,
        "accuracy": 1 / 3,
        "mean_reward": (2 + 1 - 1 + 9 + 3 - 7 - 7) / 7,
        "min_reward": -7.0,
        "max_reward": 9.0,
        "num_tokens": (2 * 4 + 3) + (3 * 4 + 6) + (2 * 4 + 2),
    }
    assert found == pytest.approx(expected, rel=1e-6) and set(found) == set(NAMES)


def test_a_filler_adds_nothing() -> None:
    totals, highest = parts([(1, 1)], [5.0, 6.0], loss_of([1.0], [5.0], [6.0]), weight=0.0)
    assert totals.tolist() == [0.0] * 9 and highest.tolist() == [-torch.inf] * 2


def test_totals_are_detached_float64() -> None:
    for part in parts([(1, 1)], [1.0, 2.0], loss_of([0.1], [1.0], [2.0])):
        assert part.dtype == torch.float64 and not part.requires_grad
