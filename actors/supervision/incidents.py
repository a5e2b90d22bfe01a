"""Lost and replaced actors: counted, capped, and put on record."""

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from actors.supervision.cures import MEMORY_CURES
from actors.supervision.endings import Loss, MemoryReport, own_job
from actors.supervision.node_memory import NodeMemory, Pause
from raylign.config.blocks import RecoveryBlock
from raylign.errors import RaylignError

log = logging.getLogger(__name__)

Happened = Literal["lost", "recovered"]
Record = Callable[[str, Happened, Mapping[str, Any]], None]
"""Puts an incident on record: role, what happened, detail."""
_OUTGROWN = 3
"""Times within `recovery.window_s` that the run may be too large for a node of its own accord."""
_FIRST_S, _LONGEST_S = 1.0, 60.0
_GB = 1e9
_GO_ON = "everything finished is saved: the same command goes on"


class Incidents:
    """One for all roles of a run, in whatever thread a loss is noticed. `begin_round` tells it where the run is."""

    def __init__(self, block: RecoveryBlock, record: Record) -> None:
        self._block, self._record = block, record
        self._round = 0
        self._lost_at: deque[float] = deque()
        self._since: dict[str, float] = {}
        self._counts: Counter[tuple[str, Happened]] = Counter()
        self._lock = threading.Lock()
        self._outgrown: defaultdict[str, deque[float]] = defaultdict(deque)
        self._short: Counter[str] = Counter()
        """By actor: losses in a row for lack of memory."""
        self.memory = NodeMemory()

    def begin_round(self, index: int) -> None:
        self._round = index

    def lost(self, role: str, actor: str, loss: Loss, error: type[RaylignError], node: str = "") -> Pause:
        """Record that `actor` (unique name) of `role` on `node` is gone; its replacement waits for the pause.

        Raises `error` past the cap of restarts, and when the run itself is again and again too large for its node.
        """
        report = loss.report or self._of_kernel(loss, node)
        short = loss.kind == "memory" or report is not None
        own = report is not None and self.memory.outgrown(report)
        waits = report is not None and not own
        log.warning("%s is lost (%s); replacing it%s", actor, loss.cause, " once its node has room" if waits else "")
        with self._lock:
            now = time.monotonic()
            self._since.setdefault(actor, now)
            kind = "memory" if short else loss.kind
            self._put(role, "lost", {"actor": actor, "cause": loss.cause, "kind": kind})
            losses = self._within(self._lost_at, now)
            self._short[actor] = self._short[actor] + 1 if short else 0
            outgrown = self._within(self._outgrown[actor], now) if own else 0
        if report is not None and outgrown >= _OUTGROWN:
            raise self._too_large(role, actor, report, outgrown, error)
        if losses > self._block.max_restarts:
            raise error(
                f"{actor} is lost ({loss.cause}), loss number {losses} within {self._block.window_s:g} s, and "
                f"recovery.max_restarts={self._block.max_restarts}; everything finished is saved. Find what ends the "
                "actors (out of memory? see the actor logs), then run the same command again"
            )
        first = min(_LONGEST_S, _FIRST_S * 2 ** (self._short[actor] - 1)) if short else 0.0

        def has_room() -> bool:
            return report is None or own or self.memory.has_room(report)

        return Pause(has_room, first, self._block.memory_timeout_s)

    def _within(self, moments: deque[float], now: float) -> int:
        """Add `now`, drop what is past the window; how many are left."""
        moments.append(now)
        while now - moments[0] > self._block.window_s:
            moments.popleft()
        return len(moments)

    def _of_kernel(self, loss: Loss, node: str) -> MemoryReport | None:
        """What is known where the kernel ended a process of the actor before Ray's monitor did."""
        if loss.kind != "process" or not node or not self.memory.ran_out(node):
            return None
        found = self.memory.now(node)
        return MemoryReport(node, found.used, found.limit, 0.95 * found.limit, {}, frozenset()) if found else None

    def _too_large(
        self, role: str, actor: str, report: MemoryReport, times: int, error: type[RaylignError]
    ) -> RaylignError:
        before, ours = self.memory.at_start(report.node), report.ours(own_job())
        others = before.used if before else report.used - ours
        failure = error(
            f"{actor} outgrew the memory of its node {times} times within {self._block.window_s:g} s: this run held "
            f"{ours / _GB:.1f} GB there beside {others / _GB:.1f} GB that were in use before it began, and Ray ends "
            f"actors above {report.threshold / _GB:.1f} of {report.limit / _GB:.1f} GB"
        )
        failure.cure = f"{MEMORY_CURES[role]}, or give the node more memory; {_GO_ON}"
        return failure

    def late(self, role: str, actor: str, error: type[RaylignError]) -> RaylignError:
        """For a replacement whose node has had no room for `recovery.memory_timeout_s`."""
        failure = error(
            f"{actor} was ended for lack of memory, and its node has had no room for a replacement within "
            f"{self._block.memory_timeout_s:g} s (recovery.memory_timeout_s)"
        )
        failure.cure = f"free memory there, or {MEMORY_CURES[role]}; {_GO_ON}"
        return failure

    def recovered(self, role: str, actor: str) -> None:
        """Record that a replacement of `actor` is at work."""
        with self._lock:
            seconds = time.monotonic() - self._since.pop(actor)
            self._put(role, "recovered", {"actor": actor, "seconds": seconds})
        log.warning("%s is replaced after %.1f s", actor, seconds)

    def _put(self, role: str, happened: Happened, detail: Mapping[str, Any]) -> None:
        self._counts[role, happened] += 1
        self._record(role, happened, {**detail, "round": self._round, "count": self._counts[role, happened]})
