"""Calibration of preference probabilities, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from raylign.calibration import calibration, draw_reliability

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
