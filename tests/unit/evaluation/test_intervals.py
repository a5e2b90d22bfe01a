"""Intervals cover what they promise, in a simulation and, for pairs that end in a win, a tie or a loss, exactly."""

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial, t, ttest_1samp

from raylign.evaluation.intervals import Values, quantile, share_interval

EVALUATIONS = 1000
LEAST, MOST = 0.93, 0.97
TIES = 0.3


def outcomes(rng: np.random.Generator, prompts: int, rate: float, ties: float) -> Values:
    """[evaluations, prompts] of 1, 1/2 and 0: `rate` is the share of wins among the decided."""
    tied = rng.random((EVALUATIONS, prompts)) < ties
    return np.where(tied, 0.5, rng.random((EVALUATIONS, prompts)) < rate)


def coverage(shares: Values, truth: float) -> float:
    low, high = share_interval(shares, 0.95)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("prompts", [50, 200])
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_95_percent_intervals_cover_95_percent(prompts: int, rate: float) -> None:
    shares = outcomes(np.random.default_rng(prompts), prompts, rate, TIES)
    assert LEAST <= coverage(shares, TIES / 2 + (1 - TIES) * rate) <= MOST


@pytest.mark.parametrize("prompts", [50, 200])
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_several_completions_a_prompt_are_no_more_evidence_than_their_prompts(prompts: int, rate: float) -> None:
    """A prompt's own rate is drawn from Beta(rate, 1 - rate); its share is the mean of four pairs."""
    rng = np.random.default_rng(prompts)
    own = rng.beta(rate, 1 - rate, (EVALUATIONS, prompts, 1))
    tied = rng.random((EVALUATIONS, prompts, 4)) < TIES
    shares = np.where(tied, 0.5, rng.random((EVALUATIONS, prompts, 4)) < own)
    truth = TIES / 2 + (1 - TIES) * rate
    assert LEAST <= coverage(shares.mean(axis=-1), truth) <= MOST
    assert coverage(shares.reshape(EVALUATIONS, -1), truth) < LEAST - 0.02, "pairs counted as if each were a prompt"


@pytest.mark.parametrize(("wins", "ties"), [(0.35, 0.3), (0.63, 0.3), (0.5, 0.0), (0.9, 0.0), (0.85, 0.1), (0.8, 0.2)])
def test_the_exact_coverage_of_50_prompts(wins: float, ties: float) -> None:
    """Every outcome of 50 prompts by its probability; at 0.9 without ties, coverage jumps as shares do."""
    counts = np.array([(w, t, 50 - w - t) for w in range(51) for t in range(51 - w)])
    places = np.arange(50)
    won, tied = counts[:, :1], counts[:, :1] + counts[:, 1:2]
    low, high = share_interval(np.where(places < won, 1.0, np.where(places < tied, 0.5, 0.0)), 0.95)
    truth = wins + ties / 2
    weights = multinomial.pmf(counts, 50, [wins, ties, max(0.0, 1 - wins - ties)])
    assert LEAST <= weights[(low <= truth) & (truth <= high)].sum() <= MOST + 0.001


def test_the_usual_interval_would_not_do() -> None:
    """Student's t on the shares, and with it the percentile bootstrap, which has the same width."""
    shares = outcomes(np.random.default_rng(1), 50, 0.9, 0.0)
    mixed = shares[np.ptp(shares, axis=-1) > 0]
    found = ttest_1samp(mixed, 0.9, axis=-1).confidence_interval(0.95)
    assert np.mean((found.low <= 0.9) & (found.high >= 0.9)) < 0.9


def test_wins_and_losses_alone_have_wilsons_interval() -> None:
    """But for the two degrees of freedom: Student's t for the normal quantile, and (n + 1) / n for one more prompt."""
    found = share_interval(np.array([1.0] * 1800 + [0.0] * 200), 0.95)
    wilson = binomtest(1800, 2000).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((wilson.low, wilson.high), abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_prompts_that_all_end_alike_leave_room_for_others(share: float) -> None:
    few, many = (share_interval(np.full(count, share), 0.95) for count in (1, 50))
    assert few[0] <= many[0] <= share <= many[1] <= few[1] and few[1] - few[0] > many[1] - many[0] > 0.01


def test_by_hand() -> None:
    """Two wins, a tie and a loss: their squares about the mean, 5/8, sum up to 11/16; one prompt more has 15/64."""
    effect = (11 / 16 + 15 / 64) / (4 * 15 / 64)
    reach = t.ppf(0.975, 3) ** 2 * effect / 4
    low, high = share_interval(np.array([1.0, 1.0, 0.5, 0.0]), 0.95)
    for bound in (low, high):  # where the distance from the mean is as many standard errors as the quantile says
        assert (0.625 - bound) ** 2 == pytest.approx(reach * bound * (1 - bound))


def test_it_widens_with_confidence_and_stays_within_0_and_1() -> None:
    shares = np.array([1.0] * 20)
    (narrow, top), (wide, end) = share_interval(shares, 0.5), share_interval(shares, 0.99)
    assert 0 <= wide < narrow < top <= end == 1.0


@pytest.mark.parametrize("shares", [[], [0.5, 1.1], [-0.1]])
def test_what_is_no_share_is_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="share"):
        share_interval(np.array(shares), 0.95)


@pytest.mark.parametrize("freedom", [1, 7, 500])
def test_the_quantile_is_that_of_students_t(freedom: int) -> None:
    assert quantile(0.95, freedom) == t.ppf(0.975, freedom)
