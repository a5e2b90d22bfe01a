"""Whether the probabilities that rewards predict for held-out preferences are those that come true."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from raylign.config.losses.reward_model import Link
from raylign.records import Preference

_LINKS = {"logistic": "sigmoid", "probit": "Phi"}
"""How people write P(better) of a gap of rewards."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs with a confidence in [low, high), the last bin's high included.

    `confidence` is their mean confidence and `accuracy` the share that was predicted right, both 0 in an empty bin.
    """

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How good predicted probabilities are. Made by `calibration`, read by reports.

    `expected_calibration_error` is the mean gap between confidence and accuracy of the bins, weighted by pairs
    (Naeini et al. 2015). `brier` is the mean squared error of the probability (Brier 1950), 0.25 for a model that
    knows nothing; `nll` is the negative log-likelihood in nats, ln 2 for such a model. `link` is that of the loss.
    """

    link: Link
    bins: tuple[Bin, ...]
    pairs: int
    accuracy: float
    confidence: float
    expected_calibration_error: float
    brier: float
    nll: float

    def measures(self) -> dict[str, float]:
        """Its numbers by metric name."""
        return {
            "calibration/ece": self.expected_calibration_error,
            "calibration/brier": self.brier,
            "calibration/nll": self.nll,
            "calibration/confidence": self.confidence,
        }


def random_pairs(rows: Sequence[Preference], seed: int) -> list[Preference]:
    """Two candidates of each row, drawn among those whose scores differ, the better first.

    Under Plackett-Luce any two compare as in Bradley-Terry. The best and the worst of a longer list do not: that they
    are its ends says more of them than which one is better.
    """
    return [_random_pair(row, random.Random(f"{seed}/{row.prompt.id}")) for row in rows]


def _random_pair(row: Preference, rng: random.Random) -> Preference:
    places = rng.choice(
        [(i, j) for i, j in combinations(range(len(row.candidates)), 2) if row.scores[i] > row.scores[j]]
    )
    candidates, scores, weights = zip(
        *((row.candidates[i], row.scores[i], row.weights[i]) for i in places), strict=True
    )
    return replace(row, candidates=candidates, scores=scores, weights=weights, reference_logps=())


def calibration(
    chosen: Sequence[float], rejected: Sequence[float], bins: int = 10, link: Link = "logistic"
) -> Calibration:
    """Reliability of p, the loss's own probability that the chosen candidate is better.

    It is sigmoid(r(w) - r(l)) for `link=logistic` (Bradley-Terry, and Plackett-Luce of any two of a list, see
    `random_pairs`), Phi(r(w) - r(l)) for `probit` (Thurstone-Mosteller); a margin of the loss has no part in it.

    Pairs come as (chosen, rejected), so that p alone would always meet the outcome 1. Each pair stands for both of its
    orders: (p, 1) and (1 - p, 0). The order that the model prefers has the confidence max(p, 1 - p), and it is right
    when p > 1/2; p = 1/2 is right half of the time. Bins divide [1/2, 1] evenly. Brier score and likelihood are the
    same for both orders. Raises ValueError when there are no pairs, the lengths differ, or a reward is not finite.
    """
    from scipy.special import log_expit, log_ndtr  # noqa: PLC0415 - for reward models alone

    gaps = _gaps(chosen, rejected)
    if bins < 1:
        raise ValueError(f"bins={bins}; give at least one")
    log_p = {"logistic": log_expit, "probit": log_ndtr}[link]
    confidences = [math.exp(log_p(abs(gap))) for gap in gaps]
    right = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]
    members: list[list[int]] = [[] for _ in range(bins)]
    for index, confidence in enumerate(confidences):
        members[min(bins - 1, int((confidence - 0.5) * 2 * bins))].append(index)
    made = tuple(_bin(number, bins, own, confidences, right) for number, own in enumerate(members))
    count = len(gaps)
    return Calibration(
        link=link,
        bins=made,
        pairs=count,
        accuracy=math.fsum(right) / count,
        confidence=math.fsum(confidences) / count,
        expected_calibration_error=math.fsum(b.pairs * abs(b.accuracy - b.confidence) for b in made) / count,
        brier=math.fsum(math.exp(log_p(-gap)) ** 2 for gap in gaps) / count,
        nll=-math.fsum(float(log_p(gap)) for gap in gaps) / count,
    )


def draw_reliability(result: Calibration, path: Path) -> None:
    """A reliability diagram as the PNG file `path`: accuracy over confidence, and how many pairs each bin has."""
    # Takes a second to load, also for commands that draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    filled = [b for b in result.bins if b.pairs]
    upper.plot([0.5, 1.0], [0.5, 1.0], linestyle="--", color="grey", label="perfectly calibrated")
    upper.plot([b.confidence for b in filled], [b.accuracy for b in filled], marker="o", label="reward model")
    upper.set(ylim=(-0.02, 1.02), ylabel="share predicted right", title=f"ECE {result.expected_calibration_error:.3f}")
    upper.legend(loc="lower right")
    lower.bar([b.low for b in result.bins], [b.pairs for b in result.bins], width=0.5 / len(result.bins), align="edge")
    lower.set(xlim=(0.5, 1.0), xlabel=f"confidence, {_LINKS[result.link]} of the reward gap", ylabel="pairs")
    figure.savefig(path, format="png", dpi=120)


def _gaps(chosen: Sequence[float], rejected: Sequence[float]) -> list[float]:
    if len(chosen) != len(rejected) or not chosen:
        raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected rewards; give one of each per pair")
    for index, pair in enumerate(zip(chosen, rejected, strict=True)):
        if not all(map(math.isfinite, pair)):
            raise ValueError(f"pair {index} has the rewards {pair}, which are not finite; leave it out")
    return [best - worst for best, worst in zip(chosen, rejected, strict=True)]


def _bin(number: int, bins: int, own: Sequence[int], confidences: Sequence[float], right: Sequence[float]) -> Bin:
    count = len(own)
    return Bin(
        low=0.5 + number / (2 * bins),
        high=0.5 + (number + 1) / (2 * bins),
        pairs=count,
        confidence=math.fsum(confidences[i] for i in own) / max(1, count),
        accuracy=math.fsum(right[i] for i in own) / max(1, count),
    )
