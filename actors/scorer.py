"""The scorer: any `raylign.scoring` object in a process of its own, away from the driver's secrets."""

from collections.abc import Sequence
from typing import Any

import ray

from raylign.config.blocks import FunctionScoringBlock
from raylign.records import Score
from raylign.scoring import FunctionScorer, ScoringItem


class _Scorer:
    """Scores one batch a call; constructing it loads the scorer."""

    def __init__(self, block: FunctionScoringBlock) -> None:
        self._scorer = FunctionScorer(block)

    def ready(self) -> bool:
        return True

    def score(self, items: Sequence[ScoringItem], allowed: int) -> list[Score]:
        """One score per item, in order; the rest is skipped once more than `allowed` of them are unscored."""
        return self._scorer.score(items, allowed)


Scorer: Any = ray.remote(_Scorer)
