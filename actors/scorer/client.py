"""The scorer actor as the driver sees it: candidates in, scores out, in order, through the deaths of actors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from actors.scorer.actor import ScoredBatch
from actors.supervision.endings import Loss, ended, ending
from actors.supervision.incidents import Incidents
from actors.supervision.node_memory import Pause
from actors.supervision.processes import kill, process_of
from actors.supervision.stacks import dump_stacks
from actors.supervision.waiting import failure
from actors.supervision.watch import Guard, attended
from raylign.config.scoring import ScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.scoring import ScoringItem, Usage, add_up, batches, longest_s, most_unscored, skipped, summary

ROLE, ACTOR = "scorer", "scorer-0"
TRIES = 3
"""Actors that one batch may cost before its items stay unscored."""
_RESTARTS_S = 60.0


class _LostActor(Exception):
    """The actor is gone, or past the deadline of a call."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.cause)
        self.loss = loss


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
        self._starting: list[Any] = [self._handle.ready.remote()]
        """The answer that an actor has loaded, while it is waited for."""
        self._pauses: list[Pause] = []
        """What a replacement waits for before it is started."""
        self._replaced: bool = False
        self._usages: dict[str, Usage] = {}
        self.guard: Guard = Guard()

    def wait_ready(self) -> None:
        """Wait until the first actor has loaded, or its replacement. Raises ScorerError when it cannot."""
        while self._starting or self._pauses:
            try:
                self._finish_starting()
            except _LostActor as lost:
                if lost.loss.kind == "silent":
                    raise ScorerError(f"starting the scorer: {lost}") from lost
                self._replace(lost.loss)

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
            if all(pause.over() for pause in self._pauses):
                self._start_replacement()
            if self._starting and ray.wait(self._starting, timeout=0)[0]:
                self._finish_starting()
        except _LostActor as lost:
            self._replace(lost.loss)
        if not self._starting and not self._pauses and (loss := ended(self._handle)):
            self._replace(loss)

    def _score_batch(self, batch: Sequence[ScoringItem], allowed: int) -> list[Score]:
        deadline = self._restarts_s + longest_s(batch, self._block)
        losses: list[str] = []
        while len(losses) < TRIES:
            try:
                self._finish_starting()
                found: ScoredBatch = _result(self._handle.score.remote(batch, allowed), deadline)
                add_up(self._usages, found.usage)
                return found.scores
            except _LostActor as lost:
                loss = self._diagnosed(lost.loss)
                # A node short of memory says nothing against the batch.
                losses += [loss.cause] if loss.kind != "memory" else []
                self._replace(loss)
        reason = f"{TRIES} scorer actors in turn were lost with this batch: {losses[-1]}"
        return [Score(None, reason=reason)] * len(batch)

    def _diagnosed(self, loss: Loss) -> Loss:
        """With the place of its stacks where an actor hangs."""
        if loss.kind != "silent":
            return loss
        return replace(loss, cause=f"{loss.cause}; {dump_stacks(self._handle, self._stacks, ACTOR)}")

    def _replace(self, loss: Loss) -> None:
        """Let another actor start, once there is room for it. Raises ScorerError past the cap of restarts."""
        node = process_of(self._handle).node if loss.kind == "process" else ""
        kill([self._handle])
        self._pauses, self._starting = [self._incidents.lost(ROLE, ACTOR, loss, ScorerError, node)], []

    def _start_replacement(self) -> None:
        for _ in self._pauses:
            self._pauses = []
            self._handle = self._spawn()
            self._starting = [self._handle.ready.remote()]
            self._replaced = True

    def _finish_starting(self) -> None:
        """Wait until the actor has loaded, a replacement also for room: the time of a call is that of its items."""
        for pause in self._pauses:
            pause.wait(self.guard.sleep, lambda: self._incidents.late(ROLE, ACTOR, ScorerError))
        self._start_replacement()
        for ready in self._starting:
            self._starting = []
            _result(ready, self._start_timeout_s)
            if self._replaced:
                self._incidents.recovered(ROLE, ACTOR)


def _result(ref: Any, timeout_s: float) -> Any:
    """What a call returns. Raises ScorerError for what the scorer itself raised, _LostActor when there is no scorer."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as cause:
        raise _LostActor(Loss("silent", f"no answer within {timeout_s:g} s")) from cause
    except RayError as cause:
        loss = ending(cause)
        if loss is None or loss.kind == "start":
            what = "scoring" if loss is None else "starting the scorer"
            raise failure(cause, timeout_s, what, ScorerError) from cause
        raise _LostActor(loss) from cause
