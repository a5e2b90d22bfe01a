"""Generators that outlive their engines: a lost one is replaced, brought up to date, and only its prompts wait."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.generator_pool import GeneratorPool
from actors.incidents import Incidents
from actors.stacks import dump_stacks
from actors.trainer_supervision import kill
from actors.waiting import get_together
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock
from raylign.errors import ActorsLost, GeneratorError
from raylign.records import Candidate, Prompt
from raylign.sampling import Decoding, prompt_seed

log = logging.getLogger(__name__)

Spawn = Callable[[int], ActorHandle[Any]]
"""Starts the generator of a slot."""
CatchUp = Callable[[ActorHandle[Any]], None]
"""Gives one generator that has just started the weights that the others serve, and proves it by the canary."""


def actor_name(slot: int) -> str:
    return f"generator-{slot}"


class SupervisedGenerators(GeneratorPool):
    """`count` slots with a generator each. While one is replaced, the others go on with the prompts."""

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
        super().__init__(
            [spawn(slot) for slot in range(block.count)],
            max_num_seqs=block.max_num_seqs,
            timeout_s=block.request_timeout_s,
        )
        self._spawn, self._catch_up, self._incidents, self._stacks = spawn, catch_up, incidents, stacks
        self._heartbeat_s, self._start_timeout_s = recovery.heartbeat_s, block.start_timeout_s
        self._starting: dict[Any, tuple[int, float]] = {}
        """Replacements that have not answered yet: slot and deadline."""

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
        """As of `GeneratorPool`; the prompts of a lost generator go to others with the same seeds."""
        queue, finished = deque(prompts), dict[str, list[Candidate]]()
        waiting: dict[Any, tuple[Prompt, int]] = {}
        last = time.monotonic()
        while queue or waiting:
            for slot in self._free_slots([slot for _, slot in waiting.values()], decoding):
                if queue:
                    prompt = queue.popleft()
                    request_seed = prompt_seed(seed, round_index, prompt.id)
                    ref: Any = self.handles[slot].sample.remote(prompt, decoding, request_seed, version)
                    waiting[ref] = (prompt, slot)
            done, _ = ray.wait([*waiting, *self._starting], timeout=self._heartbeat_s)
            for ref in (ref for ref in done if ref in waiting):
                prompt, slot = waiting[ref]
                try:
                    finished[prompt.id] = get_together([ref], self._timeout_s, f"prompt {prompt.id}", GeneratorError)[0]
                except ActorsLost as lost:
                    self._requeue(slot, str(lost), waiting, queue)
                    continue
                del waiting[ref]
                on_finished(finished[prompt.id])
                advance(1)
                last = time.monotonic()
            self._look_after_starting()
            if waiting and time.monotonic() - last > self._timeout_s:
                for slot in sorted({slot for _, slot in waiting.values()}):
                    self._requeue(slot, self._silence(slot), waiting, queue)
                last = time.monotonic()
        return [candidate for prompt in prompts for candidate in finished[prompt.id]]

    def _free_slots(self, busy: Sequence[int], decoding: Decoding) -> list[int]:
        """A slot for each further prompt, in turns; those that are starting take none."""
        ready = set(range(len(self.handles))) - {slot for slot, _ in self._starting.values()}
        room = {slot: self._prompts_in_flight(decoding) - busy.count(slot) for slot in sorted(ready)}
        turns = max(room.values(), default=0)
        return [slot for turn in range(turns) for slot, left in room.items() if turn < left]

    def _requeue(self, slot: int, cause: str, waiting: dict[Any, tuple[Prompt, int]], queue: deque[Prompt]) -> None:
        """Replace the generator of `slot` once; its prompts go to the front of the queue, in their order."""
        refs = [ref for ref, (_, own) in waiting.items() if own == slot]
        if not refs:
            return
        queue.extendleft(reversed([waiting.pop(ref)[0] for ref in refs]))
        self._replace(slot, cause)

    def _silence(self, slot: int) -> str:
        where = dump_stacks(self.handles[slot], self._stacks, actor_name(slot))
        return f"no prompt finished within {self._timeout_s:g} s (generators.request_timeout_s); {where}"

    def _replace(self, slot: int, cause: str) -> None:
        """Start a new generator for `slot`. Raises GeneratorError past the cap of restarts."""
        self._incidents.lost("generator", actor_name(slot), cause, GeneratorError)
        kill([self.handles[slot]])
        handles = list(self.handles)
        handles[slot] = self._spawn(slot)
        self.handles = tuple(handles)
        self._starting[handles[slot].ready.remote()] = (slot, time.monotonic() + self._start_timeout_s)

    def _look_after_starting(self) -> None:
        """Bring replacements that have started up to date; one that did not start is replaced again."""
        done, _ = (
            ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0) if self._starting else ([], [])
        )
        late = [ref for ref, (_, deadline) in self._starting.items() if time.monotonic() > deadline]
        for ref in dict.fromkeys([*done, *late]):
            slot, _ = self._starting.pop(ref)
            try:
                get_together([ref], 0.0 if ref in late else self._start_timeout_s, "starting it", GeneratorError)
                self._catch_up(self.handles[slot])
            except ActorsLost as lost:
                self._replace(slot, str(lost))
                continue
            self._incidents.recovered("generator", actor_name(slot))

    def call(self, method: str, *args: object, timeout_s: float, what: str) -> list[Any]:
        """Call `method` on every generator at once, after replacements have started. Raises ActorsLost."""
        self.settle()
        return super().call(method, *args, timeout_s=timeout_s, what=what)

    def settle(self) -> None:
        """Wait until no generator is starting any more."""
        while self._starting:
            ray.wait(list(self._starting), timeout=self._heartbeat_s)
            self._look_after_starting()

    def replace_all(self, cause: str) -> None:
        """New generators for all slots: what an update that broke off has left in an engine is not to be used."""
        self._starting.clear()
        for slot in range(len(self.handles)):
            self._replace(slot, cause)
        self.settle()
