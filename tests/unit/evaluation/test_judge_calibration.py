"""A calibrated judge beside scikit-learn's logistic regression, and on people whose law is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from raylign.evaluation.judge_calibration import CalibratedJudge, calibrate, measure


def answers(count: int, slope: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Differences of scores, and people who decide by 1 / (1 + exp(-slope d))."""
    generator = np.random.default_rng(seed)
    d = generator.normal(size=count)
    return [*map(float, d)], [float(generator.random() < 1 / (1 + np.exp(-slope * one))) for one in d]


def test_the_slope_is_that_of_logistic_regression_on_platts_targets() -> None:
    differences, shares = answers(120, 1.5)
    shares = [0.5 if index % 7 == 0 else share for index, share in enumerate(shares)]
    targets = np.array([1 / 122 + share * (121 / 122 - 1 / 122) for share in shares])
    twice = np.repeat(np.array(differences)[:, None], 2, axis=0)
    model = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(twice, np.tile([1, 0], 120), np.stack([targets, 1 - targets], axis=1).ravel())
    assert calibrate(differences, shares).slope == pytest.approx(float(model.coef_[0, 0]), rel=1e-4)


def test_the_slope_comes_back() -> None:
    assert calibrate(*answers(20_000, 2.0)).slope == pytest.approx(2.0, rel=0.05)
    assert calibrate(*answers(20_000, -2.0)).slope == pytest.approx(-2.0, rel=0.05)


def test_a_scale_of_scores_only_scales_the_slope() -> None:
    differences, shares = answers(200, 1.0)
    one, thousand = calibrate(differences, shares), calibrate([1000 * d for d in differences], shares)
    assert thousand.slope == pytest.approx(one.slope / 1000)
    assert thousand.probability(500) == pytest.approx(one.probability(0.5))


def test_scores_that_never_err_have_a_finite_slope() -> None:
    judge = calibrate([1.0, -1.0, 2.0, -2.0], [1.0, 0.0, 1.0, 0.0])
    assert 0 < judge.slope < 100
    assert [judge.verdict(d) for d in (1.0, -1.0)] == ["first", "second"]


def test_scores_without_differences_say_tie() -> None:
    judge = calibrate([0.0] * 4, [1.0, 0.0, 1.0, 0.5])
    assert (judge.slope, judge.verdict(0.0)) == (0.0, "tie")


def test_the_band_takes_what_people_call_ties() -> None:
    differences = [
        *(0.01 * i for i in range(-5, 6)),
        *(1.0 + 0.1 * i for i in range(5)),
        *(-1.0 - 0.1 * i for i in range(5)),
    ]
    shares = [*[0.5] * 11, *[1.0] * 5, *[0.0] * 5]
    judge = calibrate(differences, shares)
    assert [judge.verdict(d) for d in (0.03, -0.03, 1.0, -1.0)] == ["tie", "tie", "first", "second"]


def test_measured_by_hand() -> None:
    judge = CalibratedJudge(slope=1.0, band=0.1)  # a tie up to a difference of 0.405
    found = measure(judge, 9, [2.0, -2.0, 0.1, -0.1], [1.0, 1.0, 0.5, 0.0])
    assert found is not None
    assert (found.made_of, found.agreement.value, found.raw_agreement.value) == (9, 0.5, 0.5)
    p = [1 / (1 + np.exp(-d)) for d in (2.0, -2.0, 0.1, -0.1)]
    assert found.brier == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, [1.0, 1.0, 0.5, 0.0], strict=True)) / 4)
    assert found.coin_brier == pytest.approx(3 * 0.25 / 4)
    assert measure(judge, 9, [], []) is None
