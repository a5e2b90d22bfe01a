"""The scorer actor as the driver sees it: candidates in, scores out, in order, through the deaths of actors."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from actors.calls import actor_class, ask
from actors.supervision.endings import Loss, ending
from actors.supervision.slot import Slot, Starting, Supervision
from actors.supervision.watch import Guard, failure, guarded
from raylign.config.scoring import ScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.roles import ScoredBatch, ScorerProcess
from raylign.scoring.base import ScoringItem, most_unscored, skipped
from raylign.scoring.kind import batches, longest_s
from raylign.scoring.usage import Usage, add_up, summary

T = TypeVar("T")
Method = Callable[[ScorerProcess, Sequence[ScoringItem], int], ScoredBatch]
"""Who of the actor's scorers is asked."""
ACTOR = "scorer-0"
ScorerActor = actor_class(ScorerProcess, "actors.scorer.actor:ScorerWorker")
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
        spawn: Callable[[], ActorHandle[ScorerProcess]],
        block: ScoringBlock,
        supervision: Supervision,
        *,
        start_timeout_s: float,
        restarts_s: float = _RESTARTS_S,
        gold: ScoringBlock | None = None,
    ) -> None:
        """Start the first actor with `spawn`, which loads meanwhile; `gold` is the actor's second scorer.

        A call may take the time that its items have at most, and `restarts_s` for new processes of a function.
        """
        self._spawn, self._block, self._gold = spawn, block, gold
        self._start_timeout_s, self._restarts_s = start_timeout_s, restarts_s
        self._slot: Slot[ScorerProcess] = Slot(supervision, ACTOR, [ACTOR])
        self._replaced = False
        self._usages: dict[str, Usage] = {}
        self.guard = Guard()
        self._start()

    @property
    def handles(self) -> Sequence[ActorHandle[ScorerProcess]]:
        return self._slot.handles

    def _start(self) -> None:
        handle = self._spawn()
        deadline = time.monotonic() + self._start_timeout_s
        self._slot.fill([handle], Starting(ask(handle, ScorerProcess.ready), deadline))

    def wait_ready(self) -> None:
        """Wait until the first actor has loaded, or its replacement. Raises ScorerError when it cannot."""
        while not self._slot.is_ready:
            try:
                self._finish_starting()
            except _LostActor as lost:
                if lost.loss.kind == "silent":
                    raise ScorerError(f"starting the scorer: {lost}") from lost
                self._replace(lost.loss)

    @guarded
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
        return self._score(ScorerProcess.score, self._block, prompts, candidates, advance)

    @guarded
    def gold(self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> list[Score]:
        """The same by the gold scorer; empty where there is none."""
        if self._gold is None:
            return []
        return self._score(ScorerProcess.gold, self._gold, prompts, candidates, lambda finished: None)

    def _score(
        self,
        method: Method,
        block: ScoringBlock,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None],
    ) -> list[Score]:
        """What `method` of the actor says, whose scorer `block` describes."""
        self._usages = {}
        by_id = {prompt.id: prompt for prompt in prompts}
        items = [ScoringItem(by_id[candidate.prompt_id], candidate.text) for candidate in candidates]
        allowed = most_unscored(len(items), block.max_unscored)
        scores: list[Score] = []
        for batch in batches(items, block):
            if allowed < 0:
                scores += [skipped(block.max_unscored)] * len(batch)
            else:
                found = self._score_batch(method, batch, allowed, self._restarts_s + longest_s(batch, block))
                allowed -= sum(score.value is None for score in found)
                scores += found
            advance(len(batch))
        return scores

    def metrics(self) -> Mapping[str, float]:
        """What the last call took, by scorer: `judge/latency_mean_s`; see `scoring.usage.summary`.

        Of a batch that an actor died with nothing is known.
        """
        return summary(self._usages)

    def replace_dead(self) -> None:
        """Replace a dead actor while nobody asks anything of it, and say when its successor has loaded."""
        try:
            if self._slot.pause and self._slot.pause.over():
                self._restart()
            if self._slot.starting and ray.wait([self._slot.starting.ready], timeout=0)[0]:
                self._finish_starting()
        except _LostActor as lost:
            self._replace(lost.loss)
        if self._slot.is_ready and (loss := self._slot.loss()):
            self._replace(loss)

    def _score_batch(self, method: Method, batch: Sequence[ScoringItem], allowed: int, deadline: float) -> list[Score]:
        losses: list[str] = []
        while len(losses) < TRIES:
            try:
                self._finish_starting()
                found = _result(ask(self._slot.handles[0], method, batch, allowed), deadline)
                add_up(self._usages, found.usage)
                return found.scores
            except _LostActor as lost:
                loss = self._slot.diagnosed(lost.loss)
                # A node short of memory says nothing against the batch.
                losses += [loss.cause] if loss.kind != "memory" else []
                self._replace(loss)
        reason = f"{TRIES} scorer actors in turn were lost with this batch: {losses[-1]}"
        return [Score(None, reason=reason)] * len(batch)

    def _replace(self, loss: Loss) -> None:
        """Let another actor start, once there is room for it. Raises ScorerError past the cap of restarts."""
        self._slot.lost(loss)

    def _restart(self) -> None:
        self._start()
        self._replaced = True

    def _finish_starting(self) -> None:
        """Wait until the actor has loaded, a replacement also for room: the time of a call is that of its items."""
        if self._slot.pause:
            self._slot.wait_for_room(self.guard.sleep)
            self._restart()
        if starting := self._slot.starting:
            self._slot.starting = None
            _result(starting.ready, self._start_timeout_s)
            if self._replaced:
                self._slot.recovered()


def _result(ref: ObjectRef[T], timeout_s: float) -> T:
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
