"""What log-probs of texts and answers come to: means over items, with intervals, and what training changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from raylign.evaluation.held_out import Resampling, Values, mean_interval


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What a policy says of one item. Made by `raylign.evaluation.capability.likelihood`, kept in `capability.json`.

    `logps` (nats) and `sizes` (UTF-8 bytes) are those of each choice, the right one being `answer`, or of a text, whose
    `answer` is None. `tokens` are those that have a log-prob. `metrics` are what lm-eval made of an item of its own.
    """

    id: str
    logps: tuple[float, ...]
    sizes: tuple[int, ...]
    tokens: int
    answer: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


Results = Mapping[str, Sequence[ItemResult]]
"""By task."""


def summary(results: Results, before: Results, block: Resampling, seed: int) -> dict[str, float]:
    """Every measure by its name, as metrics `capability/...` show them.

    The first of a task has the task's name: the share of questions answered rightly (lm-eval's `acc`), the perplexity
    of texts, or what lm-eval calls it. It has its interval (`_low`, `_high`) and, for items that `before` has too, the
    paired difference to it (`_change`, with `_change_low`, `_change_high`). `_norm` is the share right when log-probs
    are divided by the bytes of the answer, `_nats_per_token` and `_bits_per_byte` are what their names say: the last
    compares models with different tokenizers. Intervals are `mean_interval`'s, over items.
    """
    found: dict[str, float] = {}
    for task, items in results.items():
        (name, values), *others = measures(task, items).items()
        found |= _bounded(name, values, block, seed)
        found |= {other: float(of_other.mean()) for other, of_other in others}
        if [item.id for item in before.get(task, ())] == [item.id for item in items]:
            found |= _bounded(f"{name}_change", values - measures(task, before[task])[name], block, seed)
    return found


def measures(task: str, items: Sequence[ItemResult]) -> dict[str, Values]:
    """By name: [items] values whose mean is the measure; the first one stands for the task."""
    if items[0].metrics:
        names = items[0].metrics
        return {
            f"{task}_{name}" if number else task: np.array([item.metrics[name] for item in items])
            for number, name in enumerate(names)
        }
    if items[0].answer is not None:
        return {task: _accuracies(items, by_size=False), f"{task}_norm": _accuracies(items, by_size=True)}
    nats = -np.array([item.logps[0] for item in items])
    of_token = _shares(nats, np.array([item.tokens for item in items]))
    of_byte = _shares(nats / math.log(2), np.array([item.sizes[0] for item in items]))
    mean = of_token.mean()
    # The delta method: the mean of these is exp(mean), and they vary as it does.
    perplexity = np.exp(mean) * (1 + of_token - mean)
    return {task: perplexity, f"{task}_nats_per_token": of_token, f"{task}_bits_per_byte": of_byte}


def _bounded(name: str, values: Values, block: Resampling, seed: int) -> dict[str, float]:
    low, high = mean_interval(values, block, seed)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def _accuracies(items: Sequence[ItemResult], *, by_size: bool) -> Values:
    """1 where the likeliest choice is the right one, of equal ones the first."""
    logps = [np.array(item.logps) / (np.array(item.sizes) if by_size else 1) for item in items]
    return np.array([float(own.argmax() == item.answer) for own, item in zip(logps, items, strict=True)])


def _shares(totals: Values, counts: Values) -> Values:
    """Values whose mean is sum(totals) / sum(counts), and which vary as that ratio does over items.

    The linearised ratio estimator r + (y - r x) / mean(x) (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    ratio = totals.sum() / counts.sum()
    shares: Values = ratio + (totals - ratio * counts) / counts.mean()
    return shares
