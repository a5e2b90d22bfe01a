"""A process that has ended is not there, reaped or not."""

import os
import subprocess
import sys

import psutil

from tests.processes import alive, descendants


def test_a_running_child_is_there_with_its_command_line() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", "mark"], stdin=subprocess.PIPE) as child:
        assert alive(child.pid)
        line = descendants()[psutil.Process(child.pid)]
        child.kill()
    assert line.endswith(" mark")
    assert not alive(child.pid)


def test_a_zombie_is_not_there() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
        zombie = psutil.Process(child.pid)
        assert zombie.status() == psutil.STATUS_ZOMBIE
        assert not alive(child.pid)
        assert zombie not in descendants()
