"""Lost and replaced actors: counted, capped, and put on record."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from raylign.config.blocks import RecoveryBlock
from raylign.errors import RaylignError

log = logging.getLogger(__name__)

Happened = Literal["lost", "recovered"]
Record = Callable[[str, Happened, Mapping[str, Any]], None]
"""Puts an incident on record: role, what happened, detail."""


class Incidents:
    """One for all roles of a run, in whatever thread a loss is noticed. `begin_round` tells it where the run is."""

    def __init__(self, block: RecoveryBlock, record: Record) -> None:
        self._block, self._record = block, record
        self._round = 0
        self._lost_at: deque[float] = deque()
        self._since: dict[str, float] = {}
        self._counts: Counter[tuple[str, Happened]] = Counter()
        self._lock = threading.Lock()

    def begin_round(self, index: int) -> None:
        self._round = index

    def lost(self, role: str, actor: str, cause: str, error: type[RaylignError]) -> None:
        """Record that `actor` (unique name) of `role` is gone. Raises `error` past the cap of restarts."""
        log.warning("%s is lost (%s); replacing it", actor, cause)
        with self._lock:
            now = time.monotonic()
            self._since.setdefault(actor, now)
            self._put(role, "lost", {"actor": actor, "cause": cause})
            self._lost_at.append(now)
            while now - self._lost_at[0] > self._block.window_s:
                self._lost_at.popleft()
            losses = len(self._lost_at)
        if losses > self._block.max_restarts:
            raise error(
                f"{actor} is lost ({cause}), loss number {losses} within {self._block.window_s:g} s, and "
                f"recovery.max_restarts={self._block.max_restarts}; everything finished is saved. Find what ends the "
                "actors (out of memory? see the actor logs), then run the same command again"
            )

    def recovered(self, role: str, actor: str) -> None:
        """Record that a replacement of `actor` is at work."""
        with self._lock:
            seconds = time.monotonic() - self._since.pop(actor)
            self._put(role, "recovered", {"actor": actor, "seconds": seconds})
        log.warning("%s is replaced after %.1f s", actor, seconds)

    def _put(self, role: str, happened: Happened, detail: Mapping[str, Any]) -> None:
        self._counts[role, happened] += 1
        self._record(role, happened, {**detail, "round": self._round, "count": self._counts[role, happened]})
