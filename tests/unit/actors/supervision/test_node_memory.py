"""Whose lack of memory it was, and when there is room again. Ray is not started."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.supervision import node_memory
from actors.supervision.endings import Loss, MemoryReport
from actors.supervision.incidents import Incidents
from actors.supervision.node_memory import MemoryUsage, NodeMemory, Pause, kernel_kills, usage
from raylign.config.blocks import RecoveryBlock
from raylign.errors import TrainerError

GB = 1e9
JOB = "01000000"


def report(ours: float, used: float = 13.3) -> MemoryReport:
    """A node of 14 GB on which Ray ends actors above 13, when a trainer held `ours`."""
    actor = f"{'e4' * 12}{JOB}"
    return MemoryReport("n", used * GB, 14 * GB, 13 * GB, {actor: ours * GB}, frozenset([actor]))


class Node(NodeMemory):
    """A node with so many GB in use before the run, and now."""

    def __init__(self, before: float, now: float, kills: int = 0) -> None:
        super().__init__()
        self._at_start = {"n": MemoryUsage(before * GB, 14 * GB, 0)}
        self.in_use, self.kills = now, kills

    def now(self, node: str) -> MemoryUsage | None:
        return MemoryUsage(self.in_use * GB, 14 * GB, self.kills)


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("actors.supervision.node_memory", "actors.supervision.incidents"):
        monkeypatch.setattr(f"{module}.own_job", lambda: JOB)


Seen = list[tuple[str, str, Mapping[str, Any]]]


def incidents(node: NodeMemory, seen: Seen, **options: float) -> Incidents:
    made = Incidents(RecoveryBlock.model_validate(options), lambda *entry: seen.append(entry))
    made.memory = node
    return made


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        for module in ("actors.supervision.node_memory", "actors.supervision.incidents"):
            monkeypatch.setattr(f"{module}.time.monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("before", "ours", "own"),
    [
        (2.0, 8.0, False),  # 2 + 8 of 13: others took the rest
        (2.0, 11.0, True),  # 2 + 11: there never was room
        (8.0, 8.0, True),
        (1.0, 0.3, False),
    ],
)
def test_the_run_is_to_blame_where_there_was_no_room_for_it_from_the_start(
    before: float, ours: float, own: bool
) -> None:
    assert Node(before, 0.0).outgrown(report(ours)) == own


def test_of_a_node_that_joined_later_nobody_blames_the_run() -> None:
    assert not NodeMemory().outgrown(report(12.9))


def test_a_replacement_waits_until_others_have_gone(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    seen: Seen = []
    node = Node(before=2.0, now=12.0)
    log = incidents(node, seen)
    pause = log.lost("trainer", "trainers", Loss("memory", "Ray ended it", report(3.0)), TrainerError)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > 20:
            node.in_use = 9.0

    pause.wait(sleep, lambda: log.late("trainer", "trainers", TrainerError))
    assert clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "trainers is lost (Ray ended it); replacing it once its node has room"
    assert seen[0][2] == {"actor": "trainers", "cause": "Ray ended it", "kind": "memory", "round": 0, "count": 1}


def test_memory_that_never_comes_back_ends_the_run(clock: Clock) -> None:
    log = incidents(Node(2.0, 12.0), [], memory_timeout_s=100.0)
    pause = log.lost("trainer", "trainers", Loss("memory", "Ray ended it", report(3.0)), TrainerError)
    limit = r"within 100 s \(recovery.memory_timeout_s\)"
    with pytest.raises(TrainerError, match=f"no room for a replacement {limit}") as caught:
        pause.wait(clock.sleep, lambda: log.late("trainer", "trainers", TrainerError))
    assert "trainer.max_tokens_per_micro_batch" in caught.value.cure and max(clock.slept) == 30.0


def test_a_run_that_outgrows_its_node_again_and_again_ends_in_two_lines(clock: Clock) -> None:
    log = incidents(Node(2.0, 2.0), [])
    loss = Loss("memory", "Ray ended it", report(11.0))
    for _ in range(2):
        log.lost("trainer", "trainers", loss, TrainerError).wait(clock.sleep, lambda: TrainerError("late"))
    assert clock.slept == [1.0, 2.0], "it starts anew without waiting for others, who took nothing"
    with pytest.raises(TrainerError) as caught:
        log.lost("trainer", "trainers", loss, TrainerError)
    assert str(caught.value) == (
        "trainers outgrew the memory of its node 3 times within 3600 s: this run held 11.0 GB there beside 2.0 GB that "
        "were in use before it began, and Ray ends actors above 13.0 of 14.0 GB"
    )
    assert caught.value.cure.startswith("lower trainer.max_tokens_per_micro_batch")
    assert "the same command goes on" in caught.value.cure


def test_neighbours_never_make_it_the_runs_own_fault(clock: Clock) -> None:
    log = incidents(Node(2.0, 2.0), [])
    for _ in range(6):
        log.lost("trainer", "trainers", Loss("memory", "Ray ended it", report(3.0)), TrainerError)


def test_what_the_kernel_ended_waits_for_memory_too(clock: Clock) -> None:
    seen: Seen = []
    node = Node(2.0, 13.5, kills=1)
    log = incidents(node, seen)
    pause = log.lost("generator", "generator-0", Loss("process", "gone"), TrainerError, "n")
    assert seen[0][2]["kind"] == "memory"
    clock.now = 5.0
    assert not pause.over()
    node.in_use, clock.now = 6.0, 10.0
    assert pause.over()
    again = log.lost("generator", "generator-0", Loss("process", "gone"), TrainerError, "n")
    assert seen[1][2]["kind"] == "process" and again.over(), "the kernel ended nothing since"


def test_other_losses_are_replaced_at_once() -> None:
    log = incidents(Node(2.0, 13.5), [])
    assert log.lost("trainer", "trainers", Loss("node", "gone"), TrainerError).over()


def test_a_node_that_does_not_answer_is_tried() -> None:
    class Silent(Node):
        def now(self, node: str) -> MemoryUsage | None:
            return None

    assert Silent(2.0, 13.0).has_room(report(3.0))


def test_the_kernels_count_is_read(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\noom_kill_disable 0\n")
    assert kernel_kills(tmp_path / "vmstat") == 7 and kernel_kills(tmp_path / "none") == 0


@pytest.mark.parametrize(("contained", "expected"), [(None, False), ((5, 10), True), ((5, 1 << 60), False)])
def test_a_container_has_what_it_may_have(
    contained: tuple[int, int] | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_memory, "get_cgroup_mem_stats", lambda: contained)
    found = usage()
    assert ((found.used, found.limit) == (5.0, 10.0)) == expected
    assert expected or found.limit == psutil.virtual_memory().total


def test_a_pause_is_not_looked_at_before_its_time(clock: Clock) -> None:
    looks: list[float] = []

    def look() -> bool:
        looks.append(clock.now)
        return False

    pause = Pause(look, first_s=4.0, longest_s=60.0)
    for _ in range(40):
        pause.over()
        clock.sleep(1.0)
    assert looks == [4.0, 12.0, 28.0] and not pause.expired
