"""The scoring process: `python -m raylign.scoring.worker module:function [confined] CHANNEL`.

Started by `raylign.scoring.relay`; `confined` refuses code from outside the project and the installed packages.

The first frame on the socket CHANNEL asks for the function: {"file", "line"} of it. Each later one has {"arguments":
[...]} for it: {"answers": [[value, reason, parts, final], ...]}; where value is null, reason says why, else it is the
function's own or "". `final` says whether asking again would be of no use. Either may be {"failure": text} instead.
Every answer repeats the code of its question. User code runs in the main thread, so that it may use signals.
"""

import json
import math
import numbers
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylign.boundary.code import trusted_roots
from raylign.errors import ScorerError
from raylign.records import Score
from raylign.report.text import one_line
from raylign.scoring import relay
from raylign.scoring.base import REASON_LENGTH, RETURNED_NONE
from raylign.scoring.resolve import ScoringFunction, require_file_inside, require_inside, resolve, source_of


class _Channel:
    """Questions in turn. Each is answered at most once, and only by this process."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._socket.set_inheritable(False)
        self._frames, self._code, self._owner = relay.Frames(sys.maxsize), relay.NO_CODE, os.getpid()
        os.register_at_fork(after_in_child=self._socket.close)

    def next(self) -> bytes:
        """The next question. Raises SystemExit when there will be none."""
        self._leave_if_copied()
        while not (found := self._frames.take()):
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise SystemExit
            self._frames.add(piece)
        self._code, content = found
        return content

    def answer(self, message: dict[str, Any]) -> None:
        self._leave_if_copied()
        self._socket.sendall(relay.frame(self._code, json.dumps(message).encode()))

    def _leave_if_copied(self) -> None:
        """A copy that the function made with fork, and that has returned from it too, ends here."""
        if os.getpid() != self._owner:
            os._exit(0)


def serve(spec: str, channel: _Channel, *, confined: bool) -> None:
    """Load the function, then answer questions until there are no more."""
    channel.next()
    with _reporting(channel):
        function, location = _load(spec, confined=confined)
        channel.answer(location)
        while True:
            request = json.loads(channel.next())
            with _reporting(channel):
                result = function(*request["arguments"])
                channel.answer({"answers": [_answer(value) for value in _as_list(result)]})


def _load(spec: str, *, confined: bool) -> tuple[ScoringFunction, dict[str, Any]]:
    roots = trusted_roots(Path.cwd()) if confined else ()
    if roots:
        require_inside(spec, roots)
    function = resolve(spec)
    file, line = source_of(spec, function)
    if roots and file:
        require_file_inside(file, roots)
    return function, {"file": file, "line": line}


@contextmanager
def _reporting(channel: _Channel) -> Iterator[None]:
    """Send what user code raised, whatever it is, to the scorer instead of dying of it."""
    try:
        yield
    except ScorerError as error:
        channel.answer({"failure": one_line(str(error))})
    except Exception as error:
        traceback.print_exc()
        channel.answer({"failure": one_line(f"{type(error).__name__}: {error}", REASON_LENGTH)})


def _as_list(result: object) -> Sequence[object]:
    """`result` as a sequence; arrays and tensors become lists of Python numbers."""
    if isinstance(result, Sequence) and not isinstance(result, str):
        return result
    if hasattr(result, "tolist") and isinstance(values := result.tolist(), list):
        return values
    raise ScorerError(f"returned {_shown(result)}, not a list of scores")


def _answer(value: object) -> list[object]:
    score, final = _judged(value)
    return [score.value, score.reason, score.parts, final]


def _judged(value: object) -> tuple[Score, bool]:
    """The score, and whether asking again would give the same."""
    if isinstance(value, Score):
        return _checked(value)
    if value is None:
        return Score(None, reason=RETURNED_NONE), True
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return Score(None, reason=f"returned {_shown(value)}, not a number"), False
    number = float(value)
    return (Score(number), True) if math.isfinite(number) else (Score(None, reason=f"returned {number}"), False)


def _checked(score: Score) -> tuple[Score, bool]:
    found, final = _judged(score.value)
    told = score.reason and (score.value is None or found.value is not None)
    reason = one_line(score.reason, REASON_LENGTH) if told else found.reason
    return Score(found.value, {str(name): float(part) for name, part in score.parts.items()}, reason), final


def _shown(value: object) -> str:
    return one_line(repr(value), REASON_LENGTH)


def _main(spec: str, *rest: str) -> None:
    # Where the relay is killed, this process goes too.
    relay.set_option(relay.PARENT_DEATH_SIGNAL, signal.SIGKILL)
    serve(spec, _Channel(int(rest[-1])), confined=rest[:-1] == ("confined",))


if __name__ == "__main__":
    _main(*sys.argv[1:])
