"""Scorers for tests that say what they are told to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem

Judgement = Callable[[str], Score]


@dataclass
class Told:
    """Scores a completion by a function of its text; keeps the completions of each call, and what may be lost."""

    judge: Judgement
    asked: list[list[str]] = field(default_factory=list)
    allowed: list[int | None] = field(default_factory=list)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        self.asked.append([item.completion for item in items])
        self.allowed.append(allowed)
        return [self.judge(item.completion) for item in items]


def table(**values: float | Score | None) -> Told:
    """Values by completion; None is unscored."""
    return Told(lambda text: _score(values[text]))


def _score(value: float | Score | None) -> Score:
    return value if isinstance(value, Score) else Score(value, reason="no idea" if value is None else "")


def of_prompt(name: str, *completions: str) -> list[ScoringItem]:
    """Candidates of one prompt."""
    prompt = Prompt(name, ({"role": "user", "content": f"Write about {name}."},), (1,))
    return [ScoringItem(prompt, completion) for completion in completions]
