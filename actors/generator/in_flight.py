"""Which prompts the generators are at work on, and since when each generator has been silent."""

import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from raylign.records import Prompt
from raylign.sampling.decoding import Decoding


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
