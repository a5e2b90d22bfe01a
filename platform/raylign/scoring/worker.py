"""The scoring process: `python -m raylign.scoring.worker module:function FD [confined]`.

Started by `raylign.scoring.process`; `confined` refuses code from outside the project and the installed packages.

One JSON object per message on the socket FD. First message out: {"file", "line"} of the function. Then, for each
{"arguments": [...]} for the function: {"answers": [[value, reason, parts, final], ...]}; value is null or reason is
"", and `final` says whether asking again would be of no use. Either may be {"failure": text} instead. User code runs
in the main thread, so that it may use signals.
"""

import json
import math
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from raylign.errors import ScorerError
from raylign.records import Score
from raylign.scoring.base import RETURNED_NONE
from raylign.scoring.resolve import require_file_inside, require_inside, resolve, source_of
from raylign.scoring.roots import trusted_roots
from raylign.text import escape_control

REASON_LENGTH = 300

Answer = tuple[float | None, str, dict[str, float], bool]


def serve(spec: str, channel: "Connection[Any, Any]", *, confined: bool) -> None:
    """Load the function, then answer requests until the parent goes away."""
    requests: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(channel, requests), daemon=True).start()
    with _reporting(channel):
        roots = trusted_roots(Path.cwd()) if confined else ()
        if roots:
            require_inside(spec, roots)
        function = resolve(spec)
        file, line = source_of(spec, function)
        if roots and file:
            require_file_inside(file, roots)
        _send(channel, {"file": file, "line": line})
        while True:
            request = requests.get()
            with _reporting(channel):
                result = function(*request["arguments"])
                _send(channel, {"answers": [_answer(value) for value in _as_list(result)]})


def _receive(channel: "Connection[Any, Any]", requests: "SimpleQueue[Any]") -> None:
    """Queue requests. At the parent's end take the whole process group along, however user code hangs."""
    try:
        while True:
            requests.put(json.loads(channel.recv_bytes()))
    except (EOFError, OSError):
        os.killpg(os.getpid(), signal.SIGKILL)


@contextmanager
def _reporting(channel: "Connection[Any, Any]") -> Iterator[None]:
    """Send what user code raised, whatever it is, to the parent instead of dying of it."""
    try:
        yield
    except ScorerError as error:
        _send(channel, {"failure": _one_line(str(error))})
    except Exception as error:
        traceback.print_exc()
        _send(channel, {"failure": _shortened(f"{type(error).__name__}: {error}")})


def _as_list(result: object) -> Sequence[object]:
    """`result` as a sequence; arrays and tensors become lists of Python numbers."""
    if isinstance(result, Sequence) and not isinstance(result, str):
        return result
    if hasattr(result, "tolist") and isinstance(values := result.tolist(), list):
        return values
    raise ScorerError(f"returned {_shortened(repr(result))}, not a list of scores")


def _answer(value: object) -> Answer:
    if isinstance(value, Score):
        return _answer_of(value)
    if value is None:
        return None, RETURNED_NONE, {}, True
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None, f"returned {_shortened(repr(value))}, not a number", {}, False
    number = float(value)
    return (number, "", {}, True) if math.isfinite(number) else (None, f"returned {number}", {}, False)


def _answer_of(score: Score) -> Answer:
    value, usual, _, final = _answer(score.value)
    reason = _shortened(score.reason) if score.value is None and score.reason else usual
    return value, reason, {str(name): float(part) for name, part in score.parts.items()}, final


def _send(channel: "Connection[Any, Any]", reply: dict[str, Any]) -> None:
    channel.send_bytes(json.dumps(reply).encode())


def _one_line(text: str) -> str:
    return escape_control(" ".join(text.split()))


def _shortened(text: str) -> str:
    line = _one_line(text)
    return line if len(line) <= REASON_LENGTH else f"{line[: REASON_LENGTH - 1]}…"


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])), confined=sys.argv[3:] == ["confined"])
