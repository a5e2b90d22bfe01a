"""The scorer: any `raylign.scoring` object in a process of its own."""

import logging
from collections.abc import Sequence
from typing import Any

import ray

from actors.stacks import enable_stack_dumps
from raylign import scoring
from raylign.config.scoring import FunctionScoringBlock, JudgeScoringBlock, ScoringBlock
from raylign.records import Score
from raylign.scoring import FunctionScorer, JudgeScorer, ScoringItem


class _Scorer:
    """Scores one batch a call; constructing it loads the scorer."""

    def __init__(self, block: ScoringBlock, stacks: str, name: str) -> None:
        """`stacks` is the folder for the stacks that the actor writes, under `name`, when it is asked to."""
        enable_stack_dumps(stacks, name)
        # What a judge costs is logged as INFO; it goes to the actor's own log.
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("raylign").setLevel(logging.INFO)
        self._scorer = _load(block)

    def ready(self) -> bool:
        return True

    def score(self, items: Sequence[ScoringItem], allowed: int) -> list[Score]:
        """One score per item, in order; the rest is skipped once more than `allowed` of them are unscored."""
        return self._scorer.score(items, allowed)


def _load(block: ScoringBlock) -> scoring.Scorer:
    match block:
        case FunctionScoringBlock():
            return FunctionScorer(block)
        case JudgeScoringBlock():
            return JudgeScorer(block)


Scorer: Any = ray.remote(_Scorer)
