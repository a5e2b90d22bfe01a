"""Generators that outlive their engines: a lost one is replaced, brought up to date, and only its prompts wait."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.calls import ask
from actors.supervision.endings import Loss, loss_of
from actors.supervision.slot import Slot, Starting, Supervision
from actors.supervision.turns import OwnDevices, Turns
from actors.supervision.watch import Guard, cured, get_together, guarded
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock
from raylign.errors import ActorsLost, GeneratorError, RaylignError
from raylign.records import Candidate, Prompt
from raylign.roles import Generator
from raylign.sampling.decoding import Decoding, prompt_seed


class InFlight:
    """Prompts of one call of `sample`: queued, or in the hands of the generator of a slot."""

    def __init__(self, prompts: Sequence[Prompt], decoding: Decoding, max_num_seqs: int) -> None:
        self._queue = deque(prompts)
        # Enough to fill every batch slot of an engine, with one batch waiting.
        self._most = 2 * math.ceil(max_num_seqs / decoding.num_generations)
        self._waiting: dict[Any, tuple[Prompt, int]] = {}
        self._heard: dict[int, float] = {}

    @property
    def refs(self) -> list[Any]:
        return list(self._waiting)

    def __bool__(self) -> bool:
        """Whether any prompt is not finished."""
        return bool(self._queue or self._waiting)

    def next_for(self, slots: Collection[int]) -> list[tuple[Prompt, int]]:
        """Prompts to send now, each with its slot: one for each slot in turn, as far as there is room."""
        busy = [slot for _, slot in self._waiting.values()]
        room = {slot: self._most - busy.count(slot) for slot in sorted(slots)}
        turns = [slot for turn in range(self._most) for slot, left in room.items() if turn < left]
        return [(self._queue.popleft(), slot) for slot in turns[: len(self._queue)]]

    def sent(self, ref: Any, prompt: Prompt, slot: int) -> None:
        if slot not in {own for _, own in self._waiting.values()}:
            self._heard[slot] = time.monotonic()
        self._waiting[ref] = (prompt, slot)

    def slot_of(self, ref: Any) -> int | None:
        """None for a call that was given up."""
        return self._waiting[ref][1] if ref in self._waiting else None

    def finished(self, ref: Any) -> Prompt:
        prompt, slot = self._waiting.pop(ref)
        self._heard[slot] = time.monotonic()
        return prompt

    def give_back(self, slot: int) -> None:
        """The prompts of a lost generator go to the front of the queue, in their order."""
        refs = [ref for ref, (_, own) in self._waiting.items() if own == slot]
        self._queue.extendleft(reversed([self._waiting.pop(ref)[0] for ref in refs]))

    def silent(self, limit_s: float) -> list[int]:
        """Slots with work that have finished no prompt for `limit_s`."""
        now = time.monotonic()
        at_work = sorted({slot for _, slot in self._waiting.values()})
        return [slot for slot in at_work if now - self._heard[slot] > limit_s]


_FIRST_START = "starting the generators"
P = ParamSpec("P")
T = TypeVar("T")

Spawn = Callable[[int], ActorHandle[Generator]]
"""Starts the generator of a slot."""
CatchUp = Callable[[ActorHandle[Generator]], None]
"""Gives one generator that has just started the weights that the others serve, and proves it by the canary."""


def actor_name(slot: int) -> str:
    return f"generator-{slot}"


class SupervisedGenerators:
    """`generators.count` slots with a generator each. While one is replaced, the others go on with the prompts.

    A replacement that does not start in time, as where a node is gone, is no longer waited for: the others do the work
    alone, until it starts after all.
    """

    def __init__(
        self,
        spawn: Spawn,
        *,
        block: GeneratorsBlock,
        recovery: RecoveryBlock,
        supervision: Supervision,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns or OwnDevices()
        self._spawn, self._block, self._heartbeat_s = spawn, block, recovery.heartbeat_s
        self.guard = Guard()
        self.served = 0
        self.pushed = False
        self._catch_up: CatchUp | None = None
        names = [actor_name(number) for number in range(block.count)]
        self._slots: list[Slot[Generator]] = [Slot(supervision, name, [name]) for name in names]
        for slot in self._slots:
            self._start(slot)

    @property
    def handles(self) -> tuple[ActorHandle[Generator], ...]:
        """One a slot, also where it is lost or loads."""
        return tuple(slot.handles[0] for slot in self._slots)

    def _start(self, slot: Slot[Generator]) -> None:
        handle = self._spawn(self._slots.index(slot))
        slot.fill([handle], Starting(ask(handle, Generator.ready), time.monotonic() + self._block.start_timeout_s))

    def wait_ready(self) -> None:
        """Wait until the first generators have loaded, or their replacements. Raises GeneratorError when one cannot."""
        for slot, starting in [(slot, slot.starting) for slot in self._slots if slot.starting]:
            try:
                left = max(0.0, starting.deadline - time.monotonic())
                get_together([starting.ready], left, _FIRST_START, GeneratorError)
                slot.starting = None
            except ActorsLost as lost:
                loss = loss_of(lost)
                if loss.kind == "silent":
                    limit = f"{self._block.start_timeout_s:g} s (generators.start_timeout_s)"
                    raise GeneratorError(f"{_FIRST_START}: no answer within {limit}") from lost
                if loss.kind == "start":
                    raise cured(GeneratorError(str(lost)), loss, "generator") from lost.__cause__
                self._replace(slot, loss)
        self.settle()
        if missing := len(self._slots) - len(self._ready()):
            raise self._late(f"{missing} of {len(self._slots)} generators have not started")

    def bring_newcomers_up_to_date(self, catch_up: CatchUp) -> None:
        """From now on by `catch_up`: the first generators serve what they have loaded."""
        self._catch_up = catch_up

    def sleep(self, level: Literal[1, 2]) -> None:
        """Leave the GPUs. Asked by `Turns`, as `wake_up` is."""
        self._ask_ready("going to sleep", Generator.sleep, level)

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take the GPUs' memory for `tags` again."""
        self._ask_ready("waking up", Generator.wake_up, tuple(tags))

    def _ask_ready(
        self,
        what: str,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Who is lost meanwhile is found, and replaced, by the call that this one makes way for."""
        refs = [ask(slot.handles[0], method, *args, **kwargs) for slot in self._ready()]
        for ref in refs:
            with contextlib.suppress(ActorsLost):
                get_together([ref], self._block.start_timeout_s, what, GeneratorError)

    def shut_down(self, timeout_s: float) -> None:
        """Let engines that have started end their processes themselves: killed ones leave their shared memory behind.

        One that still loads would not answer; what it leaves, its janitor removes.
        """
        refs = [ask(slot.handles[0], Generator.shutdown) for slot in self._ready()]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(refs, timeout=timeout_s)

    @guarded
    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        round_index: int,
        version: int,
        advance: Callable[[int], None],
        on_finished: Callable[[Sequence[Candidate]], None] = lambda candidates: None,
    ) -> list[Candidate]:
        """K candidates per prompt, prompt-major and in index order. `advance(1)` is called as each prompt finishes.

        The prompts of a generator that dies, or finishes none within `generators.request_timeout_s`, go to others with
        the same seeds. Raises GeneratorError for what a generator raised, and past the cap of restarts.
        """
        self._turns.engines(Generator.sample)
        work = InFlight(prompts, decoding, self._block.max_num_seqs)
        finished: dict[str, list[Candidate]] = {}
        while work:
            for prompt, number in work.next_for([self._slots.index(slot) for slot in self._ready()]):
                request_seed = prompt_seed(seed, round_index, prompt.id)
                handle = self._slots[number].handles[0]
                work.sent(ask(handle, Generator.sample, prompt, decoding, request_seed, version), prompt, number)
            for ref in self._wait([*work.refs, *(self._starting() if self._may_join(work) else ())]):
                if (asked := work.slot_of(ref)) is None:
                    continue
                try:
                    found = get_together([ref], 0.0, "sampling", GeneratorError)[0]
                except ActorsLost as lost:
                    self._take_from(asked, loss_of(lost), work)
                    continue
                finished[work.finished(ref).id] = found
                on_finished(found)
                advance(1)
            for number in work.silent(self._block.request_timeout_s):
                limit = f"{self._block.request_timeout_s:g} s (generators.request_timeout_s)"
                self._take_from(number, Loss("silent", f"no prompt finished within {limit}"), work)
            if self._may_join(work):
                self.look_after_starting()
                self._turns.engines(Generator.sample)
            self._require_one()
        return [candidate for prompt in prompts for candidate in finished[prompt.id]]

    def call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        """Every generator's answer, in order; of one that is lost meanwhile its successor's.

        `method` must be one that a generator which serves the newest version may be asked again. Raises GeneratorError
        for what a generator raised, and past the cap of restarts.
        """
        with self.guard.in_use():
            return self._call(what, timeout_s, method, *args, **kwargs)

    def _call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        answers: dict[str, T] = {}
        self.settle()
        self._turns.engines(method)
        while missing := [slot for slot in self._ready() if slot.name not in answers]:
            refs = [ask(slot.handles[0], method, *args, **kwargs) for slot in missing]
            ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
            for slot, ref in zip(missing, refs, strict=True):
                try:
                    answers[slot.name] = get_together([ref], 0.0, what, GeneratorError)[0]
                except ActorsLost as lost:
                    loss = loss_of(lost)
                    if loss.kind == "silent":
                        loss = Loss("silent", f"{lost} within {timeout_s:g} s")
                    self._replace(slot, loss)
            self.settle()
            self._turns.engines(method)
        self._turns.engines_done(method)
        return [answers[slot.name] for slot in self._slots if slot.name in answers]

    @guarded
    def settle(self) -> None:
        """Wait until every generator has started, or those that have not are late."""
        self.look_after_starting()
        while self._awaited():
            self._wait(self._starting())
            self.look_after_starting()
        self._require_one()

    def _may_join(self, work: InFlight) -> bool:
        """Whether a newcomer may be given weights: for that, trainers need the GPUs that engines at work are on."""
        return not (self._turns.shared and work.refs)

    def _awaited(self) -> bool:
        """Whether a replacement is still waited for; for memory only where no other generator could do the work."""
        on_time = any(slot.starting.on_time for slot in self._slots if slot.starting)
        needed = self._catch_up is None or not self._ready()
        return on_time or (needed and any(not slot.pause.expired for slot in self._slots if slot.pause))

    def _join(self, slot: Slot[Generator]) -> None:
        """Let one that has started hold of its GPU what the others hold of theirs."""
        level, tags = self._turns.engine_joins()
        handle, limit, what = slot.handles[0], self._block.start_timeout_s, "joining the others"
        if level is not None:
            get_together([ask(handle, Generator.sleep, level)], limit, what, GeneratorError)
        if tags:
            get_together([ask(handle, Generator.wake_up, tags)], limit, what, GeneratorError)

    def _starting(self) -> list[ObjectRef[Any]]:
        return [slot.starting.ready for slot in self._slots if slot.starting]

    def _wait(self, refs: Sequence[ObjectRef[Any]]) -> list[ObjectRef[Any]]:
        """The first of the calls to be done within a heartbeat."""
        if not refs:
            self.guard.sleep(self._heartbeat_s)
            return []
        done, _ = ray.wait(list(refs), timeout=self._heartbeat_s)
        return [ref for ref in refs if ref in done]

    def _require_one(self) -> None:
        if not self._ready() and not self._awaited():
            raise self._late("no generator is left")

    def _late(self, what: str) -> RaylignError:
        for slot in self._slots:
            if slot.pause:
                return slot.late()
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        return GeneratorError(
            f"{what}: no replacement started within {self._block.start_timeout_s:g} s "
            f"(generators.start_timeout_s); free in the cluster: {free}. Give it the node back that it lost, or lower "
            "generators.count, then run the same command again: it goes on where it stopped"
        )

    @guarded
    def replace_dead(self) -> None:
        """Replace dead generators while nobody asks anything of them."""
        for slot in self._ready():
            if loss := slot.loss():
                self._replace(slot, loss)

    def _ready(self) -> list[Slot[Generator]]:
        return [slot for slot in self._slots if slot.is_ready]

    def _take_from(self, number: int, loss: Loss, work: InFlight) -> None:
        work.give_back(number)
        self._replace(self._slots[number], loss)

    def _replace(self, slot: Slot[Generator], loss: Loss) -> None:
        """Let a new generator start once there is room for it. Raises GeneratorError past the cap."""
        slot.lost(slot.diagnosed(loss))
        self._start_paused()

    def _start_paused(self) -> None:
        for slot in self._slots:
            if slot.pause and slot.pause.over():
                self._turns.engine_starts()
                self._start(slot)

    def look_after_starting(self) -> None:
        """Start replacements that have room, bring those that have started up to date; one that dies is replaced."""
        self._start_paused()
        refs = self._starting()
        done = ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
        for slot in self._slots:
            if slot.starting is None or slot.starting.ready not in done:
                continue
            try:
                get_together([slot.starting.ready], 0.0, "starting it", GeneratorError)
                self._join(slot)
                slot.starting = None
                if self._catch_up is not None:
                    self._catch_up(slot.handles[0])
            except ActorsLost as lost:
                self._replace(slot, loss_of(lost))
                continue
            slot.recovered()
