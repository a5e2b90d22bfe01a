"""What scoring took: how long, how much from the cache, what failed and why. Kept by scorer, summed over calls."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from raylign.records import Score
from raylign.scoring.base import ItemScorer, ScoringItem

REASONS_KEPT = 3
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_LONGEST_NAME = 48


@dataclass(slots=True)
class Usage:
    """Of one scorer. Made in the scorer actor, added up by the driver.

    `calls` has the items and the wall seconds of each call that asked it something; `cache_hits` counts items that it
    was not asked about. `failures` counts unscored items by reason. `amounts` are sums of the scorer's own, such as
    requests and tokens.
    """

    calls: list[tuple[int, float]] = field(default_factory=list)
    cache_hits: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    amounts: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Usage") -> None:
        self.calls += other.calls
        self.cache_hits += other.cache_hits
        self.failures.update(other.failures)
        for name, amount in other.amounts.items():
            self.count(name, amount)

    def count(self, name: str, amount: float) -> None:
        """Add to one of the amounts."""
        self.amounts[name] = self.amounts.get(name, 0.0) + amount

    def clear(self) -> None:
        self.calls, self.cache_hits = [], 0
        self.failures.clear()
        self.amounts.clear()


Usages = Mapping[str, Usage]
"""By scorer: `judge`, or the name of a member of a composition, `outer/inner` where they are nested."""


def add_up(total: dict[str, Usage], more: Usages) -> None:
    """Add `more` to `total`, scorer by scorer."""
    for name, usage in more.items():
        total.setdefault(name, Usage()).add(usage)


def summary(usages: Usages) -> dict[str, float]:
    """Metrics of every scorer as `name/metric`.

    `calls`, `items` (asked about), `cache_hits`, `failures`, `failures_<reason>` for the most frequent ones;
    `latency_mean_s` and `latency_p95_s` are seconds per item (an item takes its call's seconds over its items),
    `call_mean_s` and `call_p95_s` seconds per call. Then the scorer's own amounts; a judge's `disagreement_rate` is
    the share of comparisons whose two verdicts differ.
    """
    return {f"{name}/{metric}": value for name, usage in usages.items() for metric, value in _metrics(usage).items()}


def _metrics(usage: Usage) -> dict[str, float]:
    items = sum(count for count, _ in usage.calls)
    reasons: Counter[str] = Counter()
    for reason, count in usage.failures.items():
        reasons[_as_name(reason)] += count
    found: dict[str, float] = {
        "calls": len(usage.calls),
        "items": items,
        "cache_hits": usage.cache_hits,
        "failures": usage.failures.total(),
        **{f"failures_{reason}": count for reason, count in reasons.most_common(REASONS_KEPT)},
        **usage.amounts,
    }
    if items:
        found |= _latencies(usage.calls)
    if comparisons := usage.amounts.get("comparisons"):
        found["disagreement_rate"] = usage.amounts["disagreements"] / comparisons
    return found


def _latencies(calls: Sequence[tuple[int, float]]) -> dict[str, float]:
    per_item = sorted(seconds / count for count, seconds in calls for _ in range(count))
    per_call = sorted(seconds for _, seconds in calls)
    return {
        "latency_mean_s": math.fsum(per_item) / len(per_item),
        "latency_p95_s": _p95(per_item),
        "call_mean_s": math.fsum(per_call) / len(per_call),
        "call_p95_s": _p95(per_call),
    }


def _p95(ordered: Sequence[float]) -> float:
    """The least value that at least 95 % do not exceed."""
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _as_name(reason: str) -> str:
    """A reason as a metric's name: its words up to the first detail."""
    words = _NOT_IN_NAMES.sub("_", re.split("[:;(]", reason.lower())[0]).strip("_")
    return words[:_LONGEST_NAME].rstrip("_") or "other"


class MeasuredScorer:
    """Asks `scorer` and keeps what that took in `usage`; what the scorer itself counts as `cache_hits` took nothing."""

    def __init__(self, scorer: ItemScorer, usage: Usage, amounts: Callable[[], Mapping[str, float]] = dict) -> None:
        """`amounts` gives sums since the scorer was made; their growth over a call is kept."""
        self._scorer, self._usage, self._amounts = scorer, usage, amounts

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """The scorer's scores. What a call took is kept also when it raises."""
        if not items:
            return []
        before, hits, started = self._amounts(), self._usage.cache_hits, monotonic()
        try:
            scores = self._scorer.score(items, allowed)
        finally:
            if asked := len(items) - (self._usage.cache_hits - hits):
                self._usage.calls.append((asked, monotonic() - started))
            for name, value in self._amounts().items():
                self._usage.count(name, value - before.get(name, 0.0))
        self._usage.failures.update(score.reason for score in scores if score.value is None)
        return scores
