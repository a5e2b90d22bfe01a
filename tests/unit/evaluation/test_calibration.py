"""Calibration of preference probabilities, against numbers worked out by hand."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from raylign.config.losses import BradleyTerryRewardLossBlock, PlackettLuceRewardLossBlock, ProbitRewardLossBlock
from raylign.evaluation.calibration import calibration, draw_reliability, random_pairs
from raylign.records import Candidate, Preference, Prompt

LOGIT_09 = math.log(9)
"""The reward gap at which one of two is preferred with probability 0.9."""


def test_four_pairs_by_hand() -> None:
    """p is 0.9, 0.9, 0.1 and 0.6: confidences 0.9, 0.9, 0.9, 0.6, of which the third is wrong."""
    chosen = [LOGIT_09, 1 + LOGIT_09, 0.0, math.log(1.5)]
    rejected = [0.0, 1.0, LOGIT_09, 0.0]
    found = calibration(chosen, rejected, bins=2)
    low, high = found.bins
    assert (low.low, low.high, high.low, high.high) == (0.5, 0.75, 0.75, 1.0)
    assert (low.pairs, high.pairs, found.pairs) == (1, 3, 4)
    assert (low.confidence, low.accuracy) == pytest.approx((0.6, 1.0))
    assert (high.confidence, high.accuracy) == pytest.approx((0.9, 2 / 3))
    assert (found.accuracy, found.confidence) == pytest.approx((0.75, 0.825))
    assert found.expected_calibration_error == pytest.approx((1 * 0.4 + 3 * (0.9 - 2 / 3)) / 4)
    assert found.brier == pytest.approx((0.1**2 + 0.1**2 + 0.9**2 + 0.4**2) / 4)
    assert found.nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.6)) / 4)


def test_a_model_that_knows_nothing() -> None:
    found = calibration([1.0, 2.0, -3.0], [1.0, 2.0, -3.0])
    assert (found.accuracy, found.confidence, found.expected_calibration_error) == (0.5, 0.5, 0.0)
    assert (found.brier, found.nll) == pytest.approx((0.25, math.log(2)))
    assert [b.pairs for b in found.bins] == [3, *[0] * 9]
    assert (found.bins[1].confidence, found.bins[1].accuracy) == (0.0, 0.0)


def test_probabilities_that_come_true_have_no_error() -> None:
    """Nine of ten pairs at probability 0.9 are right."""
    found = calibration([LOGIT_09] * 9 + [0.0], [0.0] * 9 + [LOGIT_09])
    assert found.expected_calibration_error == pytest.approx(0.0, abs=1e-12)
    overconfident = calibration([100.0] * 9 + [0.0], [0.0] * 9 + [100.0])
    assert overconfident.expected_calibration_error == pytest.approx(0.1)
    assert overconfident.bins[-1].pairs == 10, "a confidence of 1 belongs to the last bin"


def test_large_gaps_stay_finite() -> None:
    found = calibration([1e6, -1e6], [0.0, 0.0])
    assert found.nll == pytest.approx(5e5) and found.brier == 0.5


@pytest.mark.parametrize(
    ("chosen", "rejected", "bins", "message"),
    [
        ([], [], 10, "0 chosen and 0 rejected rewards; give one of each per pair"),
        ([1.0], [1.0, 2.0], 10, "1 chosen and 2 rejected"),
        ([1.0, math.nan], [0.0, 0.0], 10, r"pair 1 has the rewards \(nan, 0.0\), which are not finite; leave it out"),
        ([1.0], [0.0], 0, "bins=0; give at least one"),
    ],
)
def test_what_cannot_be_calibrated(chosen: list[float], rejected: list[float], bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(chosen, rejected, bins)


def test_the_diagram_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "reliability.png"
    draw_reliability(calibration([LOGIT_09, 0.0], [0.0, LOGIT_09]), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000


PAIRS = 20_000
NOISE = {
    BradleyTerryRewardLossBlock: np.random.Generator.logistic,  # two of Gumbel's differ so
    ProbitRewardLossBlock: np.random.Generator.normal,
}


@pytest.mark.parametrize("block", NOISE)
def test_a_perfect_model_of_pairs_has_no_error(
    block: type[BradleyTerryRewardLossBlock | ProbitRewardLossBlock],
) -> None:
    """Judges who add the noise of the loss's own model to true rewards, which the reward model knows."""
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.0, 1.5, PAIRS)
    first_won = gaps + NOISE[block](rng, size=PAIRS) > 0
    told = np.where(first_won, gaps, -gaps).tolist()
    found = {link: calibration(told, [0.0] * PAIRS, link=link) for link in ("logistic", "probit")}
    own = found.pop(block.link)
    assert own.expected_calibration_error < 0.015
    (other,) = found.values()
    assert other.expected_calibration_error > 0.04 and other.nll > own.nll and other.brier > own.brier


def ranking(rewards: Sequence[float], rng: random.Random) -> list[float]:
    """Plackett-Luce: the places, best first, are drawn one after another from what is left."""
    left, order = list(rewards), []
    while left:
        order.append(rng.choices(left, [math.exp(reward) for reward in left])[0])
        left.remove(order[-1])
    return order


def test_a_perfect_model_of_rankings_has_no_error() -> None:
    """On two of a list drawn at random; its best and worst are ordered rightly more often than sigmoid says."""
    rng = random.Random(0)
    rows = []
    for number in range(6000):
        order = ranking([rng.gauss(0.0, 1.5) for _ in range(4)], rng)
        # The reward stands in the candidate's text.
        candidates = tuple(
            Candidate(f"p{number}", i, (i,), (0.0,), repr(value), "stop", 0, 0) for i, value in enumerate(order)
        )
        rows.append(Preference(Prompt(f"p{number}", (), (1,)), candidates, (3.0, 2.0, 1.0, 0.0), (1.0,) * 4))

    def error(pairs: Sequence[Preference]) -> float:
        chosen, rejected = ([float(pair.candidates[end].text) for pair in pairs] for end in (0, -1))
        return calibration(chosen, rejected, link=PlackettLuceRewardLossBlock.link).expected_calibration_error

    pairs = random_pairs(rows, seed=3)
    assert error(pairs) < 0.02
    assert error(rows) > 0.04
    assert pairs == random_pairs(rows, seed=3) != random_pairs(rows, seed=4)
    assert all(pair.scores[0] > pair.scores[1] and len(pair.weights) == 2 for pair in pairs)


def test_candidates_of_equal_scores_are_no_pair() -> None:
    candidates = tuple(Candidate("p", i, (i,), (0.0,), "", "stop", 0, 0) for i in range(3))
    row = Preference(Prompt("p", (), (1,)), candidates, (1.0, 0.0, 0.0), (1.0,) * 3)
    drawn = {random_pairs([row], seed)[0].candidates for seed in range(20)}
    assert drawn == {(candidates[0], candidates[1]), (candidates[0], candidates[2])}
