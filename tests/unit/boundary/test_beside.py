"""Questions to a process beside: what it answers, raises and logs, and what becomes of it."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from raylign.boundary import beside
from raylign.errors import ModelError

ROOT = Path(__file__).resolve().parents[3]


def pid() -> int:
    return os.getpid()


def refuse(name: str) -> int:
    logging.getLogger("raylign.test").info("looking at %s", name)
    raise ModelError(f"{name}: not a model; take another")


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def loaded(module: str) -> bool:
    return module in sys.modules


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a command, whose process has not loaded torch."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with beside.torch_beside("fractions"):
        yield


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_without_a_process_beside_the_call_is_made_here_and_at_once() -> None:
    assert beside.asked(pid)() == os.getpid()
    with pytest.raises(ModelError, match="x: not a model"):
        beside.asked(refuse, "x")


def test_where_torch_is_loaded_none_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with beside.torch_beside():
        assert not beside.is_torch_beside() and beside.asked(pid)() == os.getpid()


@pytest.mark.usefixtures("without_torch")
def test_one_process_answers_all_questions_with_its_modules_loaded() -> None:
    answers = [beside.asked(pid) for _ in range(2)]
    first, second = (answer() for answer in answers)
    assert first == second != os.getpid()
    assert beside.asked(loaded, "fractions")()


@pytest.mark.usefixtures("without_torch")
def test_errors_are_those_of_the_function_and_its_log_lines_come_from_here(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="raylign"), pytest.raises(ModelError, match="x: not a model") as raised:
        beside.asked(refuse, "x")()
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("raylign.test", "looking at x")]
    assert any("in refuse" in note for note in raised.value.__notes__), "where it was raised"


@pytest.mark.usefixtures("without_torch")
def test_a_process_that_dies_is_told_and_the_next_question_begins_another() -> None:
    with pytest.raises(ModelError, match=r"ended with status -9; free memory"):
        beside.asked(die, signal.SIGKILL)()
    assert beside.asked(pid)() != os.getpid()


@pytest.mark.usefixtures("without_torch")
def test_its_end_frees_it_and_a_later_question_begins_another() -> None:
    first = beside.asked(pid)()
    beside.end_torch_beside()
    assert not is_alive(first)
    assert beside.asked(pid)() != first


@pytest.mark.usefixtures("without_torch")
def test_what_cannot_be_pickled_is_told_and_the_process_goes_on() -> None:
    first = beside.asked(pid)()
    with pytest.raises((AttributeError, TypeError), match="pickle|local object"):
        beside.asked(lambda: None)()
    assert beside.asked(pid)() == first


def test_leaving_does_not_wait_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with beside.torch_beside():
        process = beside.asked(pid)()
        pending = beside.asked(sleep, 3600.0)
    assert not is_alive(process) and not beside.is_torch_beside()
    with pytest.raises((ModelError, CancelledError)):
        pending()


def test_a_question_still_on_its_way_when_the_command_ends_begins_no_process() -> None:
    """Ctrl-C can come between the question and its turn; nobody would end what it began."""
    side = beside._Beside(())
    side.close()
    with pytest.raises(CancelledError):
        side._call(pid, ())
    assert side._process is None


def test_ctrl_c_in_a_terminal_ends_it_with_the_command_and_without_a_word(tmp_path: Path) -> None:
    """A terminal sends SIGINT to both."""
    code = (
        "import signal, sys\n"
        "from raylign.boundary import beside\n"
        "from tests.unit.boundary.test_beside import pid, sleep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with beside.torch_beside():\n"
        "    print(beside.asked(pid)(), flush=True)\n"
        "    beside.asked(sleep, 3600.0)()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        command = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,
        )
    assert command.stdout is not None
    child = int(command.stdout.readline())
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(60) != 0
    assert not is_alive(child)
    assert errors.read_text().count("Traceback") == 1, "the command's own"
