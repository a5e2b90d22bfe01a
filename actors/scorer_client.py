"""The scorer actor as the driver sees it: candidates in, scores out, in order."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.actor import ActorHandle

from actors.waiting import get_all
from raylign.config.blocks import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.scoring import ScoringItem

_STARTUP_S = 60.0


class ScorerClient:
    """Scores candidates; what could not be judged comes back unscored, with the reason."""

    def __init__(self, handle: ActorHandle[Any], block: FunctionScoringBlock) -> None:
        self._handle, self._block = handle, block

    def score(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None] = lambda items: None,
    ) -> list[Score]:
        """One score per candidate, in order. Raises ScorerError when the scorer itself is lost."""
        by_id = {prompt.id: prompt for prompt in prompts}
        items = [ScoringItem(by_id[candidate.prompt_id], candidate.text) for candidate in candidates]
        deadline = _STARTUP_S + 2 * self._block.timeout_s * len(items)
        scores: list[Score] = get_all([self._handle.score.remote(items)], deadline, "scoring", ScorerError)[0]
        return scores
