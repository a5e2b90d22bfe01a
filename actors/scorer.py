"""The scorer: any `raylign.scoring` object in a process of its own, away from the driver's secrets."""

from collections.abc import Sequence
from typing import Any

import ray

from raylign.config.blocks import FunctionScoringBlock
from raylign.records import Score
from raylign.scoring import FunctionScorer, ScoringItem


class _Scorer:
    """Scores batches; constructing it loads the scorer."""

    def __init__(self, block: FunctionScoringBlock) -> None:
        self._scorer = FunctionScorer(block)

    def ready(self) -> bool:
        return True

    def score(self, items: Sequence[ScoringItem]) -> list[Score]:
        return self._scorer.score(items)


Scorer: Any = ray.remote(_Scorer)
