"""What a killed process leaves behind is removed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from actors.supervision import janitor
from actors.supervision.janitor import clean_up_family, clean_up_folder, clean_up_processes, remove_folder

FAMILY = """
import multiprocessing, os, signal, sys, time
from multiprocessing import resource_tracker, shared_memory

def child(ready):
    memory = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(memory._name, "shared_memory")  # as if the tracker had been killed
    lock = multiprocessing.get_context("spawn").Lock()
    resource_tracker.unregister(lock._semlock.name, "semaphore")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.send((os.getpid(), memory.name, lock._semlock.name))
    time.sleep(600)

if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    multiprocessing.Process(target=child, args=(there,)).start()
    print(*here.recv(), flush=True)
    time.sleep(600)
"""


def eventually(is_true: Callable[[], bool], timeout_s: float = 300.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_true()


def janitors(pid: int) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"], ad_value=[])
    return [one for one in found if str(pid) in one.info["cmdline"]]


@pytest.fixture(autouse=True)
def short_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The janitor's program, but what does not end by itself is killed at once."""
    text = Path(janitor.__file__).read_text()
    assert text.count("_GRACE_S = 5.0\n") == 1
    program = tmp_path / "janitor.py"
    program.write_text(text.replace("_GRACE_S = 5.0\n", "_GRACE_S = 0.2\n"))
    monkeypatch.setattr(janitor, "__file__", str(program))


def test_children_and_shared_memory_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    program = tmp_path / "family.py"
    program.write_text(FAMILY)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as owner:
        folder = tmp_path / "sockets"
        folder.mkdir()
        clean_up_family(owner.pid, folder)
        assert owner.stdout is not None
        child, name, lock = owner.stdout.readline().split()
        segment, semaphore = Path("/dev/shm") / name.strip("/"), Path("/dev/shm") / f"sem.{lock.strip('/')}"
        assert segment.exists() and semaphore.exists()
        (watching,) = janitors(owner.pid)
        looks = watching.num_ctx_switches().voluntary
        assert eventually(lambda: watching.num_ctx_switches().voluntary > looks + 3), "the janitor looks and sleeps"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        assert eventually(lambda: not segment.exists() and not semaphore.exists())
        assert eventually(lambda: not psutil.pid_exists(int(child)))
        assert eventually(lambda: not folder.exists())
        assert eventually(lambda: not janitors(owner.pid))


def test_a_folder_goes_with_its_owner_and_the_janitor_too(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as owner:
        clean_up_folder(owner.pid, folder)
        time.sleep(0.5)
        assert folder.exists()
        owner.kill()
    assert eventually(lambda: not folder.exists())
    assert eventually(lambda: not janitors(owner.pid))


def test_a_folder_that_is_written_to_is_removed_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    writing = (
        "import pathlib, sys, time\n"
        "end = time.monotonic() + 1.0\n"
        "while time.monotonic() < end:\n"
        "    try: (pathlib.Path(sys.argv[1]) / str(time.monotonic_ns())).write_bytes(b'1')\n"
        "    except OSError: pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", writing, str(folder)]):
        time.sleep(0.3)
        remove_folder(folder)
        assert not folder.exists()


def test_processes_end_with_their_owner() -> None:
    """Also when they are nobody's children any more."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as ward:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as owner:
            clean_up_processes(owner.pid, [ward.pid])
            time.sleep(0.5)
            assert ward.poll() is None
            owner.kill()
        assert eventually(lambda: ward.poll() is not None)
    assert eventually(lambda: not janitors(owner.pid))
