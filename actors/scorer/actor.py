"""What a scorer's actor does: any `raylign.scoring` object in a process of its own."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.supervision.processes import enable_stack_dumps
from raylign.config.scoring import ScoringBlock
from raylign.errors import ScorerError
from raylign.roles import ScoredBatch, ScorerProcess
from raylign.run.sources import KeptSources, take_code
from raylign.scoring.base import Compute, ScoringItem
from raylign.scoring.composition import of_gold
from raylign.scoring.load import ONE_THREAD, load_scorer


class ScorerWorker:
    """Scores one batch a call; constructing it loads the scorer."""

    def __init__(
        self,
        block: ScoringBlock,
        cache: str,
        stacks: str,
        name: str,
        compute: Compute = ONE_THREAD,
        code: Mapping[str, KeptSources] | None = None,
        gold: ScoringBlock | None = None,
    ) -> None:
        """`cache` is the run's file of scores; `stacks` the folder for the stacks that the actor writes, under `name`,
        when it is asked to. Models run on `compute`. `code` has the sources of functions by their `module:function`.
        `gold` is a second scorer, which only `gold` asks.

        Raises ScorerError: cannot be loaded, or this node has other code for a function.
        """
        enable_stack_dumps(stacks, name)
        take_code(code or {}, "scoring.function", ScorerError)
        # What a judge costs is logged as INFO; it goes to the actor's own log.
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("raylign").setLevel(logging.INFO)
        self._scorer = load_scorer(block, Path(cache), compute)
        with of_gold():
            self._gold = None if gold is None else load_scorer(gold, Path(cache), compute)

    def ready(self) -> bool:
        return True

    def score(self, items: Sequence[ScoringItem], allowed: int) -> ScoredBatch:
        return ScoredBatch(self._scorer.score(items, allowed), self._scorer.take_usage())

    def gold(self, items: Sequence[ScoringItem], allowed: int) -> ScoredBatch:
        if self._gold is None:
            raise ScorerError("a gold score is asked, but this run has no gold scorer; set evaluation.gold")
        with of_gold():
            return ScoredBatch(self._gold.score(items, allowed), self._gold.take_usage())


_: type[ScorerProcess] = ScorerWorker
