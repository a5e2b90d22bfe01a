"""Main memory of the nodes: whose lack of it ended an actor, and when there is room for its replacement."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.utils import get_cgroup_mem_stats
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.supervision.endings import MemoryReport, own_job
from raylign.errors import RaylignError

_SPARE = 1.1
"""A node needs room for this many times what this run held: Ray's figures of processes lag behind those of nodes."""
_LOOK_S = 30.0
_LONGEST_S = 30.0
_VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Main memory of a node in bytes, as Ray's memory monitor counts it, and how often its kernel ran out of it."""

    used: float
    limit: float
    kernel_kills: int


def usage() -> MemoryUsage:
    """Of the node of this process: what its container may have, else the machine's."""
    memory = psutil.virtual_memory()
    used, limit = float(memory.total - memory.available), float(memory.total)
    contained = get_cgroup_mem_stats()
    if contained is not None and contained[1] < limit:
        used, limit = float(contained[0]), float(contained[1])
    return MemoryUsage(used, limit, kernel_kills(_VMSTAT))


def kernel_kills(vmstat: Path) -> int:
    """Processes that the kernel has ended for lack of memory; 0 where it does not say."""
    lines = vmstat.read_text().splitlines() if vmstat.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def usage_of(node: str) -> Any:
    """A call whose answer is `usage` on that node."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(usage).options(num_cpus=0, max_retries=-1, scheduling_strategy=place).remote()


class NodeMemory:
    """The nodes as they were before this run took any memory of theirs, and as they are."""

    def __init__(self) -> None:
        self._at_start: dict[str, Any] = {}
        """By node: its usage, or the call that measures it."""

    def note(self) -> None:
        """Measure all nodes of the cluster; called before the roles start. Others than this one answer by and by."""
        here = ray.get_runtime_context().get_node_id()
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        self._at_start = {node: usage() if node == here else usage_of(node) for node in nodes}

    def at_start(self, node: str) -> MemoryUsage | None:
        """None for a node that joined later, or did not answer."""
        known = self._at_start.get(node)
        if isinstance(known, MemoryUsage) or known is None:
            return known
        self._at_start[node] = found = _answer(known)
        return found

    def now(self, node: str) -> MemoryUsage | None:
        """None when the node does not answer."""
        if node == ray.get_runtime_context().get_node_id():
            return usage()
        return _answer(usage_of(node))

    def ran_out(self, node: str) -> bool:
        """Whether the node's kernel has ended processes for lack of memory since this was last asked."""
        before, found = self.at_start(node), self.now(node)
        if before is None or found is None:
            return False
        self._at_start[node] = MemoryUsage(before.used, before.limit, found.kernel_kills)
        return found.kernel_kills > before.kernel_kills

    def outgrown(self, report: MemoryReport) -> bool:
        """Whether this run is too large for the node as it found it, so that no neighbour is to blame.

        Without what others took since the run began there would have been no room either, or hardly any.
        """
        before = self.at_start(report.node)
        return before is not None and before.used + _SPARE * report.ours(own_job()) > report.threshold

    def has_room(self, report: MemoryReport) -> bool:
        """Whether the node has room again for what Ray has ended of this run; also when nobody can tell."""
        found = self.now(report.node)
        return found is None or found.used + _SPARE * report.wanted(own_job()) < report.threshold


def _answer(ref: Any) -> MemoryUsage | None:
    try:
        found: MemoryUsage = ray.get(ref, timeout=_LOOK_S)
    except ray.exceptions.RayError:
        return None
    return found


class Pause:
    """Before a replacement starts: until its node has room, looked at at growing distances, at most `longest_s`."""

    def __init__(self, has_room: Callable[[], bool], first_s: float, longest_s: float) -> None:
        """The first look is after `first_s` seconds."""
        now = time.monotonic()
        self._has_room, self._distance = has_room, first_s
        self._next, self._until = now + first_s, now + longest_s

    @property
    def expired(self) -> bool:
        return time.monotonic() > self._until

    def over(self) -> bool:
        """Whether the replacement may start; looks when it is time to."""
        if time.monotonic() < self._next:
            return False
        if self._has_room():
            return True
        self._distance = min(_LONGEST_S, max(1.0, 2 * self._distance))
        self._next = time.monotonic() + self._distance
        return False

    def wait(self, sleep: Callable[[float], None], late: Callable[[], RaylignError]) -> None:
        """Return when it is over; raise what `late` gives when it has lasted too long."""
        while not self.over():
            if self.expired:
                raise late()
            sleep(max(0.05, min(self._next, self._until) - time.monotonic()))
