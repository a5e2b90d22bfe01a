"""What `precision` asks of its judge, and the intervals over held-out pairs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from raylign.config.base import Block
from tests.benchmarks.harness.pairs import TokenPair

Values = NDArray[np.float64]

_RESAMPLES = 10_000


class LogpsJob(Block):
    """Score both completions of `pairs` with the model of `folder`, in fp32."""

    folder: str
    pairs: tuple[TokenPair, ...]
    threads: int


class LogpsResult(Block):
    """Summed log-probs (nats) of each pair's completions, in order."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def dpo_margins(policy: LogpsResult, reference: LogpsResult, beta: float) -> Values:
    """Rewards of the chosen less those of the rejected completions: Rafailov et al. (2023), equation 7."""
    ratios = [np.array(getattr(policy, side)) - np.array(getattr(reference, side)) for side in ("chosen", "rejected")]
    margins: Values = beta * (ratios[0] - ratios[1])
    return margins


def losses_of(margins: Values) -> Values:
    """-log sigmoid(margin)."""
    losses: Values = np.logaddexp(0.0, -margins)
    return losses


def right_of(margins: Values) -> Values:
    """1 where the chosen completion has the higher reward, 1/2 for a tie."""
    right: Values = (1 + np.sign(margins)) / 2
    return right


def interval(values: Values) -> tuple[float, float]:
    """95 % of the mean, by percentile bootstrap over pairs; the mean twice where all are equal."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=rng).confidence_interval
    return float(found.low), float(found.high)


def share_of(values: Values, exact: Values) -> Values:
    """How much of `exact` is in `values`, by least squares over all [seeds, pairs]: the share, and 95 % over pairs."""
    products, squares = (values * exact).sum(0), (exact * exact).sum(0)
    draws = np.random.default_rng(0).integers(len(squares), size=(_RESAMPLES, len(squares)))
    shares = products[draws].sum(1) / squares[draws].sum(1)
    found: Values = np.array([products.sum() / squares.sum(), *np.quantile(shares, (0.025, 0.975))])
    return found


def shown(values: Values, digits: int = 4) -> str:
    low, high = interval(values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_over_seeds(seeds: Sequence[Values]) -> Values:
    """For each pair."""
    mean: Values = np.mean(seeds, axis=0)
    return mean
