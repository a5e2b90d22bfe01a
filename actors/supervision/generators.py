"""Generators that outlive their engines: a lost one is replaced, brought up to date, and only its prompts wait."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.generator.in_flight import InFlight
from actors.generator.pool import GeneratorPool
from actors.supervision.endings import Loss, ended, loss_of
from actors.supervision.incidents import Incidents
from actors.supervision.node_memory import Pause
from actors.supervision.processes import kill, process_of
from actors.supervision.stacks import dump_stacks
from actors.supervision.waiting import cured, get_together
from actors.supervision.watch import Guard, attended
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock
from raylign.errors import ActorsLost, GeneratorError, RaylignError
from raylign.records import Candidate, Prompt
from raylign.sampling.decoding import Decoding, prompt_seed

_FIRST_START = "starting the generators"

Spawn = Callable[[int], ActorHandle[Any]]
"""Starts the generator of a slot."""
CatchUp = Callable[[ActorHandle[Any]], None]
"""Gives one generator that has just started the weights that the others serve, and proves it by the canary."""


def actor_name(slot: int) -> str:
    return f"generator-{slot}"


class SupervisedGenerators(GeneratorPool):
    """`count` slots with a generator each. While one is replaced, the others go on with the prompts.

    A replacement that does not start in time, as where a node is gone, is no longer waited for: the others do the work
    alone, until it starts after all.
    """

    def __init__(
        self,
        spawn: Spawn,
        catch_up: CatchUp,
        *,
        block: GeneratorsBlock,
        recovery: RecoveryBlock,
        incidents: Incidents,
        stacks: Path,
    ) -> None:
        super().__init__([spawn(slot) for slot in range(block.count)])
        self._spawn, self._catch_up, self._incidents, self._stacks = spawn, catch_up, incidents, stacks
        self._block, self._heartbeat_s = block, recovery.heartbeat_s
        self.guard = Guard()
        self._loaded = False
        self._starting: dict[Any, tuple[int, float]] = {}
        """Those that have not answered yet: slot, and until when they are waited for."""
        self._paused: dict[int, Pause] = {}
        """Slots whose replacement waits for memory."""

    def wait_ready(self) -> None:
        """Wait until the first generators have loaded, or their replacements. Raises GeneratorError when one cannot."""
        deadline = time.monotonic() + self._block.start_timeout_s
        refs: list[Any] = [handle.ready.remote() for handle in self.handles]
        for slot, ref in enumerate(refs):
            try:
                get_together([ref], max(0.0, deadline - time.monotonic()), _FIRST_START, GeneratorError)
            except ActorsLost as lost:
                loss = loss_of(lost)
                if loss.kind == "silent":
                    limit = f"{self._block.start_timeout_s:g} s (generators.start_timeout_s)"
                    raise GeneratorError(f"{_FIRST_START}: no answer within {limit}") from lost
                if loss.kind == "start":
                    raise cured(GeneratorError(str(lost)), loss, "generator") from lost.__cause__
                self._replace(slot, loss)
        self.settle()
        if missing := len(self.handles) - len(self._ready_slots()):
            raise self._late(f"{missing} of {len(self.handles)} generators have not started")
        self._loaded = True

    def shut_down(self, timeout_s: float) -> None:
        """Let engines that have started end their processes themselves: killed ones leave their shared memory behind.

        One that still loads would not answer; what it leaves, its janitor removes.
        """
        started = self._ready_slots() if self._loaded else []
        refs = [self.handles[slot].shutdown.remote() for slot in started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(refs, timeout=timeout_s)

    @attended
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
        work = InFlight(prompts, decoding, self._block.max_num_seqs)
        finished: dict[str, list[Candidate]] = {}
        while work:
            for prompt, slot in work.next_for(self._ready_slots()):
                request_seed = prompt_seed(seed, round_index, prompt.id)
                work.sent(self.handles[slot].sample.remote(prompt, decoding, request_seed, version), prompt, slot)
            for ref in self._wait([*work.refs, *self._starting]):
                for slot in work.slot_of(ref):
                    try:
                        found: list[Candidate] = get_together([ref], 0.0, "sampling", GeneratorError)[0]
                    except ActorsLost as lost:
                        self._take_from(slot, loss_of(lost), work)
                        continue
                    finished[work.finished(ref).id] = found
                    on_finished(found)
                    advance(1)
            for slot in work.silent(self._block.request_timeout_s):
                limit = f"{self._block.request_timeout_s:g} s (generators.request_timeout_s)"
                self._take_from(slot, self._silent(slot, f"no prompt finished within {limit}"), work)
            self.look_after_starting()
            self._require_one()
        return [candidate for prompt in prompts for candidate in finished[prompt.id]]

    @attended
    def call(self, method: str, *args: object, timeout_s: float, what: str) -> list[Any]:
        """As of `GeneratorPool`; a generator that is lost meanwhile is replaced and its successor asked.

        `method` must be one that a generator which serves the newest version may be asked again.
        """
        answers: dict[int, Any] = {}
        self.settle()
        while missing := [slot for slot in self._ready_slots() if slot not in answers]:
            refs = {slot: getattr(self.handles[slot], method).remote(*args) for slot in missing}
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
            for slot, ref in refs.items():
                try:
                    answers[slot] = get_together([ref], 0.0, what, GeneratorError)[0]
                except ActorsLost as lost:
                    loss = loss_of(lost)
                    if loss.kind == "silent":
                        loss = self._silent(slot, f"{lost} within {timeout_s:g} s")
                    self._replace(slot, loss)
            self.settle()
        return [answers[slot] for slot in sorted(answers)]

    @attended
    def settle(self) -> None:
        """Wait until every generator has started, or those that have not are late."""
        self.look_after_starting()
        while self._awaited():
            self._wait(list(self._starting))
            self.look_after_starting()
        self._require_one()

    def _awaited(self) -> bool:
        """Whether a replacement is still waited for; for memory only where no other generator could do the work."""
        on_time = any(time.monotonic() < deadline for _, deadline in self._starting.values())
        needed = not (self._loaded and self._ready_slots())
        return on_time or (needed and any(not pause.expired for pause in self._paused.values()))

    def _wait(self, refs: Sequence[Any]) -> list[Any]:
        """The first of the calls to be done within a heartbeat."""
        if not refs:
            self.guard.sleep(self._heartbeat_s)
            return []
        return list(ray.wait(list(refs), timeout=self._heartbeat_s)[0])

    def _require_one(self) -> None:
        if not self._ready_slots() and not self._awaited():
            raise self._late("no generator is left")

    def _late(self, what: str) -> RaylignError:
        if self._paused:
            return self._incidents.late("generator", actor_name(min(self._paused)), GeneratorError)
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        return GeneratorError(
            f"{what}: no replacement started within {self._block.start_timeout_s:g} s "
            f"(generators.start_timeout_s); free in the cluster: {free}. Give it the node back that it lost, or lower "
            "generators.count, then run the same command again: it goes on where it stopped"
        )

    def tend(self) -> None:
        """Replace dead generators while nobody asks anything of them."""
        for slot in self._ready_slots():
            if loss := ended(self.handles[slot]):
                self._replace(slot, loss)

    def _ready_slots(self) -> list[int]:
        starting = {slot for slot, _ in self._starting.values()}
        return [slot for slot in range(len(self.handles)) if slot not in starting and slot not in self._paused]

    def _silent(self, slot: int, cause: str) -> Loss:
        return Loss("silent", f"{cause}; {dump_stacks(self.handles[slot], self._stacks, actor_name(slot))}")

    def _take_from(self, slot: int, loss: Loss, work: InFlight) -> None:
        work.give_back(slot)
        self._replace(slot, loss)

    def _replace(self, slot: int, loss: Loss) -> None:
        """Let a new generator start for `slot` once there is room for it. Raises GeneratorError past the cap."""
        node = process_of(self.handles[slot]).node if loss.kind == "process" else ""
        self._paused[slot] = self._incidents.lost("generator", actor_name(slot), loss, GeneratorError, node)
        kill([self.handles[slot]])
        self._start_paused()

    def _start_paused(self) -> None:
        for slot in [slot for slot, pause in self._paused.items() if pause.over()]:
            del self._paused[slot]
            handles = list(self.handles)
            handles[slot] = self._spawn(slot)
            self.handles = tuple(handles)
            self._starting[handles[slot].ready.remote()] = (slot, time.monotonic() + self._block.start_timeout_s)

    def look_after_starting(self) -> None:
        """Start replacements that have room, bring those that have started up to date; one that dies is replaced again.

        The first generators need no bringing up: they serve what they have loaded.
        """
        self._start_paused()
        starting = list(self._starting)
        done = ray.wait(starting, num_returns=len(starting), timeout=0)[0] if starting else []
        for ref in done:
            slot, _ = self._starting.pop(ref)
            try:
                get_together([ref], 0.0, "starting it", GeneratorError)
                if self._loaded:
                    self._catch_up(self.handles[slot])
            except ActorsLost as lost:
                self._replace(slot, loss_of(lost))
                continue
            self._incidents.recovered("generator", actor_name(slot))
