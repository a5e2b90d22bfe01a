"""Scores from a Python function that the user names as `module:function`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Score
from raylign.scoring.base import RETURNED_NONE, ScoringItem, most_unscored, skipped
from raylign.scoring.process import NoAnswer, ScoringProcess


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """Where a scoring function comes from. `sha256` is of the whole `file`; `line` counts from 1."""

    file: Path
    sha256: str
    line: int


def describe_function(spec: str, *, allow_outside: bool = False) -> FunctionInfo:
    """Locate `module:function`, doing nothing with it but the import, in a process of its own.

    Raises ScorerError, also for code outside the working directory and the packages installed in this environment:
    such code does not run unless `allow_outside`.
    """
    process = ScoringProcess(spec, confined=not allow_outside)
    process.kill()
    file = Path(process.location["file"])
    if not file.is_file():
        raise ScorerError(
            f"scoring.function={spec} has no source file to show; wrap it in a function of your own module"
        )
    return FunctionInfo(file, hashlib.sha256(file.read_bytes()).hexdigest(), process.location["line"])


class FunctionScorer:
    """Calls `function(prompts, completions) -> list[float | None]` in a child process without secrets.

    As TRL's reward functions, it gets two parallel lists: `prompts`, each a list of chat messages (dicts with "role"
    and "content"), and `completions`, plain strings. It returns one number per completion, higher is better, or None
    to abstain. A call has `timeout_s` seconds per item. When a call raises, is late, kills its process or returns
    the wrong number of scores, its items are asked one by one; so is an item whose score is not a finite number. Only
    the items that fail on their own stay unscored. A function whose scores depend on the rest of the batch is
    therefore not suitable.
    """

    def __init__(self, block: FunctionScoringBlock) -> None:
        """Load the function. Raises ScorerError: no such module, no such function, not callable, failing import."""
        self._block = block
        self._process = ScoringProcess(block.function)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored.

        By default that is a share of `max_unscored`; who asks in several calls says how many the whole may still lose.
        """
        tally = _Tally(most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed)
        for start in range(0, len(items), self._block.batch_size):
            self._score_batch(items[start : start + self._block.batch_size], tally)
        return tally.scores

    def close(self) -> None:
        """End the child process."""
        self._process.kill()

    def _score_batch(self, batch: Sequence[ScoringItem], tally: "_Tally") -> None:
        for item, score in zip(batch, self._ask(batch, tally), strict=True):
            again = len(batch) > 1 and score.value is None and score.reason != RETURNED_NONE
            tally.add(self._ask([item], tally)[0] if again else score)

    def _ask(self, items: Sequence[ScoringItem], tally: "_Tally") -> list[Score]:
        if tally.over_limit:
            return [skipped(self._block.max_unscored)] * len(items)
        if not self._process.alive:
            self._process = ScoringProcess(self._block.function)
        try:
            answers = self._process.ask(_request(items), self._block.timeout_s * len(items))["answers"]
        except NoAnswer as failure:
            return [Score(None, reason=str(failure))] * len(items)
        if len(answers) != len(items):
            return [Score(None, reason=f"returned {len(answers)} scores for {len(items)} completions")] * len(items)
        return [Score(value, reason=reason or "") for value, reason in answers]


@dataclass
class _Tally:
    """The scores so far, of which `allowed` may be unscored."""

    allowed: int
    scores: list[Score] = field(default_factory=list)
    unscored: int = 0

    @property
    def over_limit(self) -> bool:
        return self.unscored > self.allowed

    def add(self, score: Score) -> None:
        self.scores.append(score)
        self.unscored += score.value is None


def _request(items: Sequence[ScoringItem]) -> dict[str, Any]:
    return {
        "prompts": [[dict(message) for message in item.prompt.messages] for item in items],
        "completions": [item.completion for item in items],
    }
