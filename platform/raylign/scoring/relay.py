"""The process between a scorer and its scoring function: `python -I relay.py CHANNEL COMMAND...`.

The function runs in a child of this process, on a channel of its own. This process alone has the scorer's channel. It
gives each request a code that nobody can guess: what comes without it, late, forged or from a copy of the function's
process, is dropped. All that the function starts stays below this process, daemons too, and ends with it. So that it is
there at once, this file is the whole program: it imports psutil only.

A frame is a length (4 bytes), a code (16 bytes) and that many bytes. To the scorer, the first byte says what follows.
"""

import ctypes
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress

import psutil

CODE_BYTES = 16
LARGEST_ANSWER = 16 << 20
REPLY, ENDED = b"+", b"-"
NO_CODE = bytes(CODE_BYTES)
SUBREAPER, PARENT_DEATH_SIGNAL, DUMPABLE = 36, 1, 4
"""Options of prctl(2)."""
END_S = 10.0
CLOSED_S = 5.0
_HEAD = struct.Struct(f">I{CODE_BYTES}s")
_PIECE = 1 << 16
_PIECES = 1024
"""More than an answer has."""


class TooLarge(Exception):
    """A frame says that it is longer than allowed."""


class Frames:
    """Whole frames out of bytes that come in pieces."""

    def __init__(self, largest: int) -> None:
        self._bytes, self._largest = bytearray(), largest

    def add(self, piece: bytes) -> None:
        self._bytes += piece

    def take(self) -> tuple[bytes, bytes] | None:
        """Code and content of the next frame, None while it is not whole. Raises TooLarge."""
        if len(self._bytes) < _HEAD.size:
            return None
        size, code = _HEAD.unpack_from(self._bytes)
        if size > self._largest:
            raise TooLarge(f"wrote an answer of more than {self._largest >> 20} MiB")
        end = _HEAD.size + size
        if len(self._bytes) < end:
            return None
        content = bytes(self._bytes[_HEAD.size : end])
        del self._bytes[:end]
        return code, content


def frame(code: bytes, content: bytes) -> bytes:
    return _HEAD.pack(len(content), code) + content


def set_option(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


class _Relay:
    """Passes requests on and answers back until either side goes."""

    def __init__(self, scorer: socket.socket, command: list[str]) -> None:
        self._scorer = scorer
        self._worker, theirs = socket.socketpair()
        self._worker.setblocking(False)
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, stack: None)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._requests, self._answers = Frames(sys.maxsize), Frames(LARGEST_ANSWER)
        self._waiting = bytearray()
        self._asked = self._code = NO_CODE
        self._selector = selectors.DefaultSelector()
        self._selector.register(scorer, selectors.EVENT_READ)
        self._selector.register(self._worker, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        try:
            while self._pass_on():
                continue
        except TooLarge as fault:
            self._say_end(str(fault))
        except ConnectionError:  # of the scorer, which has gone
            return

    def _pass_on(self) -> bool:
        """Do what can be done now; False once the scorer or the worker has gone."""
        ready = {key.fileobj: events for key, events in self._selector.select()}
        if self._scorer in ready:
            piece = self._scorer.recv(_PIECE)
            if not piece:
                return False
            self._requests.add(piece)
            self._take_requests()
        if ready.get(self._worker, 0) & selectors.EVENT_WRITE:
            self._write()
        if self._woken in ready:
            os.read(self._woken, _PIECE)
        code = self._exit_code() if self._woken in ready else None
        is_open = self._read() if self._worker in ready or code is not None else True
        if code is None and is_open:
            return True
        self._say_end(_cause(self._exit_code_soon() if code is None else code))
        return False

    def _take_requests(self) -> None:
        while request := self._requests.take():
            self._asked, content = request
            self._code = os.urandom(CODE_BYTES)
            self._waiting += frame(self._code, content)
            self._selector.modify(self._worker, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _write(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # where it has gone, reading tells
            del self._waiting[: self._worker.send(self._waiting[:_PIECE])]
        if not self._waiting:
            self._selector.modify(self._worker, selectors.EVENT_READ)

    def _read(self) -> bool:
        """Take what the worker has written, the scorer not forgotten; whether its channel is still open."""
        for _ in range(_PIECES):
            try:
                piece = self._worker.recv(_PIECE)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not piece:
                return False
            self._answers.add(piece)
            self._take_answers()
        return True

    def _take_answers(self) -> None:
        while answer := self._answers.take():
            code, content = answer
            if self._code != NO_CODE and code == self._code:
                self._code = NO_CODE
                self._scorer.sendall(frame(self._asked, REPLY + content))

    def _say_end(self, cause: str) -> None:
        with suppress(ConnectionError):
            self._scorer.sendall(frame(self._asked, ENDED + cause.encode()))

    def _exit_code(self) -> int | None:
        """Of the worker, once it has ended; what else has ended is reaped."""
        return reap().get(self._process.pid)

    def _exit_code_soon(self) -> int | None:
        """Of a worker that has closed its channel, as it does when it ends."""
        deadline = time.monotonic() + CLOSED_S
        while (code := self._exit_code()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return code


def reap() -> dict[int, int]:
    """Exit codes by process id of the children that have ended; negative for signals."""
    found = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return found


def end_descendants() -> None:
    """Until none is left: stop them all, so that none can start another one, and kill them."""
    this, deadline = psutil.Process(), time.monotonic() + END_S
    while (family := set(this.children(recursive=True))) and time.monotonic() < deadline:
        seen: set[psutil.Process] = set()
        while new := family - seen:
            _signal(new, signal.SIGSTOP)
            seen |= new
            family = set(this.children(recursive=True))
        _signal(seen, signal.SIGKILL)
        reap()
        time.sleep(0.005)


def _signal(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _cause(code: int | None) -> str:
    if code is None:
        return "the scoring process closed its channel"
    if code < 0:
        return f"the scoring process was killed by {signal.Signals(-code).name}"
    return f"the scoring process exited with code {code}"


def main(channel: int, command: list[str]) -> None:
    os.set_inheritable(channel, False)
    set_option(SUBREAPER, 1)
    # Nobody of the same user opens its descriptors through /proc or traces it.
    set_option(DUMPABLE, 0)
    try:
        _Relay(socket.socket(fileno=channel), command).run()
    finally:
        end_descendants()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
