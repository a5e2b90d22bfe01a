"""Length-controlled win rates against a simulation whose truth is known, and against scikit-learn's regression."""

import numpy as np
import pytest

from raylign.evaluation.intervals import Values
from raylign.evaluation.length_control import Controlled, difficulties, fit_logistic, length_controlled, standardised


def sigmoid(values: Values) -> Values:
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)))


def drawn(
    rng: np.random.Generator, prompts: int, theta: float, phi: float, gamma: Values | float = 0.0
) -> tuple[Values, Values]:
    """Outcomes and length differences: answers are longer by 0.7 standard deviations of 100 characters on average."""
    longer = rng.normal(70, 100, prompts)
    chance = sigmoid(theta + phi * np.tanh(longer / longer.std(ddof=1)) + gamma)
    return (rng.random(prompts) < chance).astype(np.float64), longer


def controlled(outcomes: Values, longer: Values, difficulty: Values | None = None) -> Controlled:
    gamma = None if difficulty is None else list(difficulty)
    return length_controlled([[y] for y in outcomes], [[z] for z in longer], 0.95, gamma)


def test_where_length_alone_decides_the_controlled_rate_is_a_half() -> None:
    outcomes, longer = drawn(np.random.default_rng(0), 5000, theta=0.0, phi=3.0)
    found = controlled(outcomes, longer)
    assert outcomes.mean() > 0.7
    assert found.low < 0.5 < found.high and abs(found.rate - 0.5) < 0.03
    assert found.length == pytest.approx(3.0, abs=0.3)


def test_what_length_does_not_explain_stays() -> None:
    outcomes, longer = drawn(np.random.default_rng(1), 5000, theta=1.0, phi=0.0)
    found = controlled(outcomes, longer)
    assert found.rate == pytest.approx(outcomes.mean(), abs=0.03) and found.low < sigmoid(np.array(1.0)) < found.high


@pytest.mark.parametrize("prompts", [50, 200])
@pytest.mark.parametrize(("theta", "phi"), [(0.0, 1.5), (1.5, 1.0)])
def test_its_interval_covers(prompts: int, theta: float, phi: float) -> None:
    rng = np.random.default_rng(prompts)
    found = [controlled(*drawn(rng, prompts, theta, phi)) for _ in range(300)]
    truth = sigmoid(np.array(theta))
    # 300 evaluations tell 95 % from anything to 1.3 points
    assert 0.92 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.98


def test_the_regression_is_that_of_scikit_learn() -> None:
    """Soft outcomes are two rows there, weighted by what they say; C is the inverse of the prior's precision."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    rng = np.random.default_rng(2)
    features = np.stack([rng.normal(size=80), np.tanh(rng.normal(size=80))], axis=1)
    targets, weights = rng.choice([0.0, 0.25, 0.5, 1.0], 80), rng.uniform(0.2, 1.0, 80)
    own = fit_logistic(features, targets, weights, np.array([0.5, 0.5]))
    peer = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    twice = np.concatenate([features, features])
    peer.fit(twice, [1] * 80 + [0] * 80, sample_weight=np.concatenate([weights * targets, weights * (1 - targets)]))
    assert own == pytest.approx(peer.coef_[0], abs=1e-5)


@pytest.mark.parametrize("outcomes", [[1.0] * 8, [0.0] * 8, [0.5] * 8, [0.0] * 4 + [1.0] * 4])
def test_nothing_runs_away(outcomes: list[float]) -> None:
    """All won, all lost, all tied, and the longer answer always better: no maximum of the likelihood alone."""
    found = controlled(np.array(outcomes), np.linspace(-4.0, 3.0, 8))
    assert 0 < found.low < found.rate < found.high < 1
    mirrored = controlled(1 - np.array(outcomes), -np.linspace(-4.0, 3.0, 8))
    assert mirrored.rate == pytest.approx(1 - found.rate, abs=1e-6)


def test_equal_lengths_tell_nothing_of_length() -> None:
    assert list(standardised([5.0, 5.0])) == [0.0, 0.0] and list(standardised([5.0])) == [0.0]
    found = controlled(np.array([1.0, 0.0, 1.0, 1.0]), np.full(4, 7.0))
    assert found.rate == pytest.approx(4 / 6) and found.length == 0.0  # with a win and a loss


def test_lengths_are_measured_in_their_standard_deviation() -> None:
    longer = [100.0, -50.0, 30.0]
    assert standardised(longer) == pytest.approx(np.tanh(np.array(longer) / np.std(longer, ddof=1)))


def test_difficulty_from_other_opponents_narrows_the_interval() -> None:
    """Prompts differ by 2 logits; three other opponents tell which are easy, and the fourth's rate gets surer."""
    rng = np.random.default_rng(3)
    gamma = rng.normal(0, 2.0, 400)
    others = [drawn(rng, 400, theta, 0.5, gamma) for theta in (-0.5, 0.0, 0.5)]
    told = difficulties([y.tolist() for y, _ in others], [z.tolist() for _, z in others], [0, 1, 2], 400)
    assert np.corrcoef(told, gamma)[0, 1] > 0.6
    outcomes, longer = drawn(rng, 400, 0.3, 0.5, gamma)
    blind, told_rate = controlled(outcomes, longer), controlled(outcomes, longer, told)
    truth = sigmoid(0.3 + gamma).mean()
    assert told_rate.low < truth < told_rate.high
    assert told_rate.high - told_rate.low < blind.high - blind.low
