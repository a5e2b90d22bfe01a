"""Bradley-Terry strengths from judgements."""

import math

import numpy as np
import pytest
from scipy.optimize import fsolve
from scipy.special import expit

from raylign.pairing import bradley_terry_strengths

A, B, C = range(3)
THREE = [[0, 7, 6], [3, 0, 4], [4, 6, 0]]
"""A beats B 7 of 10 times, A beats C 6, C beats B 6."""


def test_two_players_are_the_logit_of_the_share() -> None:
    """w_A - w_B = ln(7/3), with variance 1 / (10 x 0.7 x 0.3)."""
    found = bradley_terry_strengths([[0, 7], [3, 0]])
    assert found.values == pytest.approx((math.log(7 / 3) / 2, -math.log(7 / 3) / 2))
    assert found.probability(0, 1) == pytest.approx(0.7)
    half = 1.959964 / math.sqrt(2.1)
    assert found.difference_interval(0, 1) == pytest.approx((math.log(7 / 3) - half, math.log(7 / 3) + half), abs=1e-5)


def test_three_players_solve_the_equations_of_the_likelihood() -> None:
    """At the maximum every player's wins are those expected: sum_j 10 sigmoid(w_i - w_j) = 13, 7 and 10."""

    def surprises(strengths: list[float]) -> list[float]:
        w = [*strengths, -sum(strengths)]
        expected = [sum(10 * float(expit(w[i] - w[j])) for j in range(3) if j != i) for i in range(3)]
        return [expected[A] - 13, expected[B] - 7]

    first, second = fsolve(surprises, [0.0, 0.0])
    found = bradley_terry_strengths(THREE)
    assert found.values == pytest.approx((first, second, -first - second), abs=1e-6)
    # C wins as often as it loses.
    assert found.values[C] == pytest.approx(0.0, abs=1e-6) and found.values[A] == pytest.approx(-found.values[B])
    assert found.values[A] > found.values[C] > found.values[B]
    assert (found.probability(C, B), found.probability(A, C)) == pytest.approx((0.6, 0.6), abs=0.01)
    assert found.probability(A, B) == pytest.approx(0.7, abs=0.01)


def test_intervals_shrink_with_the_root_of_the_judgements() -> None:
    few, many = (bradley_terry_strengths([[times * n for n in row] for row in THREE]) for times in (1, 100))
    for found in (few, many):
        low, high = found.interval(A)
        assert low < found.values[A] < high
    widths = [high - low for low, high in (few.difference_interval(A, B), many.difference_interval(A, B))]
    assert widths[0] / widths[1] == pytest.approx(10, rel=1e-3)


def test_twenty_players_are_recovered() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20)
    truth -= truth.mean()
    above = np.triu(rng.binomial(200, expit(truth[:, None] - truth[None, :])), 1)
    below = np.tril(200 - above.T, -1)
    found = bradley_terry_strengths((above + below).tolist())
    inside = [low <= value <= high for value, (low, high) in zip(truth, map(found.interval, range(20)), strict=True)]
    assert sum(inside) >= 17


def test_ties_are_half_a_win_each() -> None:
    assert bradley_terry_strengths([[0, 2.5], [2.5, 0]]).values == pytest.approx((0.0, 0.0))


@pytest.mark.parametrize(
    ("wins", "group"),
    [([[0, 5], [0, 0]], r"\[0\]"), ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], r"\[0, 1\]")],
)
def test_an_infinite_estimate_is_refused(wins: list[list[float]], group: str) -> None:
    with pytest.raises(ValueError, match=f"infinite or undefined.*{group}.*give a prior"):
        bradley_terry_strengths(wins)


def test_a_prior_keeps_it_finite() -> None:
    """5.5 to 0.5 wins: ln 11."""
    found = bradley_terry_strengths([[0, 5], [0, 0]], prior=0.5)
    assert found.values[0] - found.values[1] == pytest.approx(math.log(11))


@pytest.mark.parametrize("wins", [[[0, 1]], [[0]], [[0, -1], [1, 0]], [[0, math.nan], [1, 0]]])
def test_what_is_no_table_of_wins_is_refused(wins: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="wins must be a square table"):
        bradley_terry_strengths(wins)
