"""Scores from a function in a child process: batches, deadlines, and the item that is to blame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylign.chunks import chunks
from raylign.config.scoring import FunctionScoringBlock, VerifierScoringBlock
from raylign.records import Score
from raylign.scoring.base import ScoringItem, most_unscored, skipped
from raylign.scoring.process import NoAnswer, ScoringProcess


class ProcessScorer:
    """Asks `module:function` about `batch_size` items at a time, `timeout_s` seconds per item.

    When a call raises, is late, kills its process or returns the wrong number of scores, its items are asked one by
    one; so is an item whose score is not a finite number. Only the items that fail on their own stay unscored.
    """

    def __init__(
        self,
        function: str,
        block: FunctionScoringBlock | VerifierScoringBlock,
        arguments: Callable[[Sequence[ScoringItem]], Sequence[Any]],
        *,
        grace_s: float = 0.0,
    ) -> None:
        """Load the function. `arguments` makes what it is called with, as JSON can hold it.

        A call gets `grace_s` on top of its items' seconds, for a function that keeps the deadlines itself.

        Raises ScorerError: no such module, no such function, not callable, failing import.
        """
        self._function, self._block, self._arguments = function, block, arguments
        self._grace_s = grace_s
        self._process = ScoringProcess(function)

    @property
    def file(self) -> Path:
        """Where the function is defined; Path(".") for code without a file."""
        return Path(self._process.location.file)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored.

        By default that is a share of `max_unscored`; who asks in several calls says how many the whole may still lose.
        """
        tally = _Tally(most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed)
        for batch in chunks(items, self._block.batch_size):
            self._score_batch(batch, tally)
        return tally.scores

    def close(self) -> None:
        """End the child process."""
        self._process.kill()

    def _score_batch(self, batch: Sequence[ScoringItem], tally: "_Tally") -> None:
        for item, (score, final) in zip(batch, self._ask(batch, tally), strict=True):
            again = len(batch) > 1 and not final
            tally.add(self._ask([item], tally)[0][0] if again else score)

    def _ask(self, items: Sequence[ScoringItem], tally: "_Tally") -> list[tuple[Score, bool]]:
        """Each score, and whether asking again would say the same."""
        if tally.over_limit:
            return [(skipped(self._block.max_unscored), True)] * len(items)
        if not self._process.alive:
            self._process = ScoringProcess(self._function)
        try:
            request, seconds = {"arguments": self._arguments(items)}, self._block.timeout_s * len(items)
            answers = self._process.ask(request, seconds + self._grace_s)
        except NoAnswer as failure:
            return [(Score(None, reason=str(failure)), False)] * len(items)
        if len(answers) != len(items):
            reason = f"returned {len(answers)} scores for {len(items)} completions"
            return [(Score(None, reason=reason), False)] * len(items)
        return [(Score(given.value, given.parts, given.reason), given.final) for given in answers]


@dataclass
class _Tally:
    """The scores so far. At most `allowed` of them may be unscored."""

    allowed: int
    scores: list[Score] = field(default_factory=list)
    unscored: int = 0

    @property
    def over_limit(self) -> bool:
        return self.unscored > self.allowed

    def add(self, score: Score) -> None:
        self.scores.append(score)
        self.unscored += score.value is None
