"""Who is at work is left alone; what the watch cannot put right reaches whoever works next."""

import threading
import time
from collections.abc import Callable

import pytest

from actors.supervision.watch import Guard, guarded, watched
from raylign.errors import TrainerError


class Role:
    """Counts looks; `work` takes as long as it is told."""

    def __init__(self, fails: bool = False, look: Callable[[], object] = lambda: None) -> None:
        self.guard, self.looks, self._fails, self._look = Guard(), 0, fails, look

    def replace_dead(self) -> None:
        self.looks += 1
        self._look()
        if self._fails:
            raise TrainerError("past the cap")

    @guarded
    def work(self, meanwhile: Callable[[], None]) -> str:
        meanwhile()
        return "done"


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_idle_roles_are_looked_at_until_the_end() -> None:
    role, other = Role(), Role()
    with watched((role, other), 0.01):
        until(lambda: role.looks > 2 and other.looks > 2)
    looks = role.looks
    time.sleep(0.05)
    assert role.looks == looks and "watch" not in {thread.name for thread in threading.enumerate()}


def test_a_role_at_work_is_not_looked_at() -> None:
    role, other = Role(), Role()
    seen: list[int] = []

    def meanwhile() -> None:
        role.work(lambda: None)  # a method may use another
        before, looks = role.looks, other.looks
        until(lambda: other.looks > looks + 3)
        seen.append(role.looks - before)

    with watched((role, other), 0.01):
        assert role.work(meanwhile) == "done"
        assert seen == [0]
        until(lambda: role.looks > 0)


def test_a_failure_is_raised_where_the_role_is_used_next() -> None:
    role = Role(fails=True)
    with watched((role,), 0.01):
        until(lambda: role.looks > 0)
    with pytest.raises(TrainerError, match="past the cap"):
        role.work(lambda: None)


def test_a_role_that_takes_long_to_put_right_holds_up_no_other() -> None:
    ended = threading.Event()
    slow, other = Role(look=lambda: ended.wait(10)), Role()
    with watched((slow, other), 0.01):
        until(lambda: slow.looks == 1)
        looks = other.looks
        until(lambda: other.looks > looks + 3)
        assert slow.looks == 1
        ended.set()
