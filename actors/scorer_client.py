"""The scorer actor as the driver sees it: candidates in, scores out, in order, through the deaths of actors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.incidents import Incidents
from actors.processes import is_dead, kill
from actors.scorer import ScoredBatch
from actors.stacks import dump_stacks
from actors.waiting import get_all, root_cause
from actors.watch import GONE, Guard, attended
from raylign.config.scoring import ScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.scoring import ScoringItem, Usage, add_up, batches, longest_s, most_unscored, skipped, summary

ROLE, ACTOR = "scorer", "scorer-0"
TRIES = 3
"""Actors that one batch may cost before its items stay unscored."""
_RESTARTS_S = 60.0


class _LostActor(Exception):
    """The actor died, or is past the deadline of a call; the text says which."""


class _SilentActor(_LostActor):
    """It is past the deadline and may still run."""


class ScorerClient:
    """Scores candidates; what could not be judged comes back unscored, with the reason.

    The actor has one batch at a time and every batch is kept as it finishes. An actor that dies or hangs is replaced
    and only the batch it had is asked again.
    """

    def __init__(
        self,
        spawn: Callable[[], ActorHandle[Any]],
        block: ScoringBlock,
        incidents: Incidents,
        *,
        stacks: Path,
        start_timeout_s: float,
        restarts_s: float = _RESTARTS_S,
    ) -> None:
        """Start the first actor with `spawn`, which loads meanwhile; one that hangs leaves its stacks in `stacks`.

        A call may take the time that its items have at most, and `restarts_s` for new processes of a function.
        """
        self._spawn, self._block, self._incidents = spawn, block, incidents
        self._stacks, self._start_timeout_s, self._restarts_s = stacks, start_timeout_s, restarts_s
        self._handle = spawn()
        self._loads = True
        """Whether nobody has seen yet that the first actor has loaded."""
        self._starting: list[Any] = []
        """The answer that a replacement has loaded, while it is waited for."""
        self._usages: dict[str, Usage] = {}
        self.guard = Guard()

    def wait_ready(self) -> None:
        """Wait until the first actor has loaded. Raises ScorerError when it cannot."""
        get_all([self._handle.ready.remote()], self._start_timeout_s, "starting the scorer", ScorerError)
        self._loads = False

    @attended
    def score(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None] = lambda finished: None,
    ) -> list[Score]:
        """One score per candidate, in order; `advance(n)` is called when n more have one.

        Nothing is asked any more once more than `scoring.max_unscored` of all candidates is unscored. Raises
        ScorerError when the function cannot be loaded any more, the judge is refused, or past the cap of restarts.
        """
        self._usages = {}
        by_id = {prompt.id: prompt for prompt in prompts}
        items = [ScoringItem(by_id[candidate.prompt_id], candidate.text) for candidate in candidates]
        allowed = most_unscored(len(items), self._block.max_unscored)
        scores: list[Score] = []
        for batch in batches(items, self._block):
            if allowed < 0:
                scores += [skipped(self._block.max_unscored)] * len(batch)
            else:
                found = self._score_batch(batch, allowed)
                allowed -= sum(score.value is None for score in found)
                scores += found
            advance(len(batch))
        return scores

    def metrics(self) -> Mapping[str, float]:
        """What the last call of `score` took, by scorer: `judge/latency_mean_s`; see `raylign.scoring.summary`.

        Of a batch that an actor died with nothing is known.
        """
        return summary(self._usages)

    def tend(self) -> None:
        """Replace a dead actor while nobody asks anything of it, and say when its successor has loaded."""
        try:
            if self._starting and ray.wait(self._starting, timeout=0)[0]:
                self._finish_replacing()
        except _LostActor as loss:
            self._replace(str(loss))
        if not self._starting and is_dead(self._handle):
            self._replace(GONE)

    def _score_batch(self, batch: Sequence[ScoringItem], allowed: int) -> list[Score]:
        deadline = self._restarts_s + longest_s(batch, self._block)
        cause = ""
        for _ in range(TRIES):
            try:
                self._finish_starting()
                found: ScoredBatch = _result(self._handle.score.remote(batch, allowed), deadline)
                add_up(self._usages, found.usage)
                return found.scores
            except _LostActor as loss:
                cause = self._diagnosed(loss)
                self._replace(cause)
        return [Score(None, reason=f"{TRIES} scorer actors in turn were lost with this batch: {cause}")] * len(batch)

    def _diagnosed(self, loss: _LostActor) -> str:
        """The cause; of an actor that hangs also where its stacks are."""
        if not isinstance(loss, _SilentActor):
            return str(loss)
        return f"{loss}; {dump_stacks(self._handle, self._stacks, ACTOR)}"

    def _replace(self, cause: str) -> None:
        """Start another actor. Raises ScorerError past the cap of restarts."""
        kill([self._handle])
        self._incidents.lost(ROLE, ACTOR, cause, ScorerError)
        self._handle = self._spawn()
        self._loads = False
        self._starting = [self._handle.ready.remote()]

    def _finish_starting(self) -> None:
        """Wait until the actor has loaded: the time of a call is that of its items alone."""
        if self._loads:
            self._loads = False
            _result(self._handle.ready.remote(), self._start_timeout_s)
        self._finish_replacing()

    def _finish_replacing(self) -> None:
        for ready in self._starting:
            self._starting = []
            _result(ready, self._start_timeout_s)
            self._incidents.recovered(ROLE, ACTOR)


def _result(ref: Any, timeout_s: float) -> Any:
    """What a call returns. Raises ScorerError for what the scorer itself raised, _LostActor when there is no scorer."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as cause:
        raise _SilentActor(f"no answer within {timeout_s:g} s") from cause
    except RayTaskError as cause:
        raise ScorerError(f"scoring: {root_cause(cause)}") from cause
    except RayActorError as cause:
        if cause.actor_init_failed:
            raise ScorerError(f"starting the scorer: {cause.error_msg.splitlines()[-1]}") from cause
        raise _LostActor(cause.error_msg.splitlines()[0]) from cause
    except RayError as cause:
        raise _LostActor(f"{type(cause).__name__}: {cause}") from cause
