"""Questions that only torch can answer, put to a process beside a command that does without torch itself.

That process begins with the first question, works while the command reads tokenizers and rows, and is gone before
actors want its memory and its core. In a script, which has torch, the same functions run where they are called.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, TypeVar, TypeVarTuple

from raylign.boundary.imports import lean_imports
from raylign.errors import ModelError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_STDERR = 2


class _Beside:
    """A process that answers one question at a time. It begins with the first, and again with one after its end."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._process: subprocess.Popen[bytes] | None = None
        self._closed, self._beginning = False, Lock()

    def ask(self, function: Callable[..., T], args: Sequence[Any]) -> Callable[[], T]:
        return self._turns.submit(self._call, function, args).result

    def end(self, *, for_good: bool = False) -> None:
        with self._beginning:
            self._closed = for_good
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        """Without waiting for answers: who leaves early, as by Ctrl-C, has no use for them."""
        self.end(for_good=True)
        self._turns.shutdown(cancel_futures=True)

    def _call(self, function: Callable[..., T], args: Sequence[Any]) -> T:
        with self._beginning:
            if self._closed:
                raise CancelledError
            if self._process is None or self._process.poll() is not None:
                self._process = self._begun()
        try:
            self._channel.send((function, args))
            while isinstance(answer := self._channel.recv(), logging.LogRecord):
                logging.getLogger(answer.name).handle(answer)
        except (EOFError, OSError) as error:
            raise ModelError(
                f"the process that checks the model ended with status {self._process.wait()}; free memory if that is "
                "-9, else see what `raylign doctor` says of torch"
            ) from error
        value, failure = answer
        if failure is not None:
            raise failure
        found: T = value
        return found

    def _begun(self) -> subprocess.Popen[bytes]:
        self._channel, theirs = multiprocessing.Pipe()
        level = logging.getLogger("raylign").getEffectiveLevel()
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(level), *self._modules],
                stdin=subprocess.DEVNULL,
                stdout=_output(),
                stderr=_output(),
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            )


_beside: _Beside | None = None


@contextmanager
def torch_beside(*modules: str) -> Iterator[None]:
    """Inside, `asked` asks a process that imports `modules` first; there is none where torch is loaded already."""
    global _beside
    if "torch" in sys.modules:
        yield
        return
    _beside = _Beside(modules)
    try:
        yield
    finally:
        _beside.close()
        _beside = None


def is_torch_beside() -> bool:
    """Whether this process can do without torch."""
    return _beside is not None


def end_torch_beside() -> None:
    """Nothing more will be asked for a while: free the memory."""
    if _beside is not None:
        _beside.end()


def asked(function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], T]:
    """Begin `function(*args)` in the process beside this one; call what is returned for the answer, or what it raised.

    Function, arguments and answer are pickled. Where there is no such process, the call is over when this returns.
    """
    if _beside is None:
        answer = function(*args)
        return lambda: answer
    return _beside.ask(function, args)


def _output() -> int:
    """Where Python writes errors now."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return _STDERR


class _ToChannel(logging.Handler):
    """Log lines are written by the process that asks, between others of its own."""

    def __init__(self, channel: Connection) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._channel.send(record)


def _serve(channel: Connection, level: int, modules: Sequence[str]) -> None:
    own = logging.getLogger("raylign")
    own.setLevel(level)
    own.addHandler(_ToChannel(channel))
    own.propagate = False
    with lean_imports():
        for module in modules:
            # What cannot be imported fails again, and is told, when a function needs it.
            with suppress(Exception):
                import_module(module)
    while True:
        answer: tuple[Any, Exception | None]
        try:
            function, args = channel.recv()
            answer = function(*args), None
        except EOFError:
            return
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        channel.send(answer)


if __name__ == "__main__":
    # Ctrl-C reaches the whole terminal, and the command that asks ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
