"""Bradley-Terry strengths from judgements."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from scipy.optimize import fsolve
from scipy.special import expit

from raylign.pairing.strengths import bradley_terry_strengths

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


def test_an_infinite_estimate_is_refused_with_the_players() -> None:
    """Players 0 and 1 share their wins and never lose to player 2."""
    tables: dict[str, list[list[float]]] = {
        r"\[0\]": [[0, 5], [0, 0]],
        r"\[0, 1\]": [[0, 1, 1], [1, 0, 0], [0, 0, 0]],
    }
    for group, wins in tables.items():
        with pytest.raises(ValueError, match=f"infinite: .*{group}.* one way; .*give a prior"):
            bradley_terry_strengths(wins)


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_players_who_never_met_have_no_strengths_whatever_the_prior(prior: float) -> None:
    with pytest.raises(ValueError, match=r"undefined: the groups of players \[\[0, 1\], \[2\]\] never met"):
        bradley_terry_strengths([[0, 1, 0], [1, 0, 0], [0, 0, 0]], prior)


def test_the_table_given_stays_as_it_is() -> None:
    table = np.array(THREE, dtype=np.float64)
    bradley_terry_strengths(table.tolist(), prior=1.0)
    kept = table.copy()
    bradley_terry_strengths(cast(Sequence[Sequence[float]], table), prior=1.0)
    assert np.array_equal(table, kept)


def test_strengths_far_apart_are_found() -> None:
    """ln(10^6) between neighbours in a chain of four."""
    chain: list[list[float]] = [[0, 1e6, 0, 0], [1, 0, 1e6, 0], [0, 1, 0, 1e6], [0, 0, 1, 0]]
    assert np.diff(bradley_terry_strengths(chain).values) == pytest.approx([-math.log(1e6)] * 3, rel=1e-6)


def test_standard_errors_and_the_confidence_of_intervals() -> None:
    """w_A - w_B = 2 w_A of two players, so that their standard error is half of sqrt(1 / 2.1)."""
    found = bradley_terry_strengths([[0, 7], [3, 0]])
    assert found.standard_errors == pytest.approx([0.5 / math.sqrt(2.1)] * 2)
    low, high = found.interval(0, confidence=0.5)
    assert (high - low) / 2 == pytest.approx(0.674490 * found.standard_errors[0], rel=1e-5)
    with pytest.raises(ValueError, match="confidence=95 must lie between 0 and 1"):
        found.interval(0, confidence=95)


def test_a_prior_keeps_it_finite() -> None:
    """5.5 to 0.5 wins: ln 11."""
    found = bradley_terry_strengths([[0, 5], [0, 0]], prior=0.5)
    assert found.values[0] - found.values[1] == pytest.approx(math.log(11))


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 1]], "square table of at least 2 x 2; got 1 rows of \\[2\\] counts"),
        ([[0]], "square table"),
        ([], "square table"),
        ([[0, 1], [1]], "got 2 rows of \\[1, 2\\] counts"),
        ([[0, -1], [1, 0]], r"wins\[0\]\[1\]=-1: counts must be"),
        ([[0, 1], [math.nan, 0]], r"wins\[1\]\[0\]=nan: counts must be"),
        ([[0, 1], [1, 2]], r"wins\[1\]\[1\]=2: .* 0 for a player against itself"),
    ],
)
def test_what_is_no_table_of_wins_is_refused(wins: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bradley_terry_strengths(wins)


@pytest.mark.parametrize("prior", [-0.5, math.nan, math.inf])
def test_a_prior_is_finite_and_not_below_0(prior: float) -> None:
    with pytest.raises(ValueError, match=f"prior={prior} must be"):
        bradley_terry_strengths(THREE, prior)
