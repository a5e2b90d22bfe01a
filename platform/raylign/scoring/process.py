"""The scoring process and its driver's side: it is started, asked, and ended when it is late."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import psutil
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from raylign.boundary.secrets import is_secret
from raylign.chunks import chunks
from raylign.config.scoring import FunctionScoringBlock, VerifierScoringBlock
from raylign.errors import ScorerError
from raylign.records import Score
from raylign.report.text import one_line
from raylign.scoring import relay
from raylign.scoring.base import REASON_LENGTH, ScoringItem, most_unscored, skipped

START_TIMEOUT_S = 600.0
EXIT_GRACE_S = relay.END_S + 2.0
STDERR = 2
_LONGEST_FAILURE = 4000
T = TypeVar("T")
MARK = "RAYLIGN_SCORING_PROCESS"
"""Variable by which the processes are found that a relay cannot end any more, because it was killed itself."""


class NoAnswer(ScorerError):
    """The scoring process gave no usable reply; the text is the reason of an unscored item."""


class Location(BaseModel, frozen=True, strict=True):
    """Where a scoring function is defined; `file` is empty for code without one, `line` counts from 1."""

    file: str
    line: int


class Given(NamedTuple):
    """What the function gave for one item: its value, or the reason why there is none; `final` if it would give that
    again. Beside a value `reason` is the function's own, if it gives one.
    """

    value: FiniteFloat | None
    reason: str
    parts: dict[str, float]
    final: bool


class _Answers(BaseModel, strict=True):
    answers: list[Given]


class _Failure(BaseModel, strict=True):
    failure: str


_LOCATION: TypeAdapter[Location | _Failure] = TypeAdapter(Location | _Failure)
_ANSWERS: TypeAdapter[_Answers | _Failure] = TypeAdapter(_Answers | _Failure)


def read_location(content: bytes) -> Location:
    """The first message of a scoring process. Raises NoAnswer, also for the failure that it tells."""
    return _read(content, _LOCATION, "place of a function")


def read_answers(content: bytes) -> list[Given]:
    """A later message. Raises NoAnswer, also for the failure that it tells."""
    found = _read(content, _ANSWERS, "list of scores")
    return [given._replace(reason=one_line(given.reason, REASON_LENGTH)) for given in found.answers]


def _read(content: bytes, kind: TypeAdapter[T | _Failure], what: str) -> T:
    try:
        found = kind.validate_json(content)
    except ValidationError as error:
        raise NoAnswer(f"answered no {what}: {_shown(content)}") from error
    if isinstance(found, _Failure):
        _tell(found)
    return found


class ScoringProcess:
    """A child that has loaded `module:function`. It and all it starts are ended when a reply is late."""

    def __init__(self, spec: str, *, confined: bool = False) -> None:
        """Start the child and wait until the function is loaded. Raises ScorerError if that fails.

        `confined` refuses code from outside the working directory and the installed packages, before it runs.
        """
        self._channel, theirs = socket.socketpair()
        self._frames, self._code, self._mark = relay.Frames(sys.maxsize), relay.NO_CODE, secrets.token_hex(16)
        worker = [sys.executable, "-u", "-P", "-m", "raylign.scoring.worker", spec, *(["confined"] if confined else [])]
        with theirs:
            self._relay = subprocess.Popen(
                [sys.executable, "-I", str(Path(relay.__file__)), str(theirs.fileno()), *worker],
                stdin=subprocess.DEVNULL,
                stdout=STDERR,
                pass_fds=(theirs.fileno(),),
                env=child_environment(os.environ, sys.path) | {MARK: self._mark},
                start_new_session=True,
            )
        try:
            self._send(b"", START_TIMEOUT_S)
            self.location = read_location(self._receive(START_TIMEOUT_S))
        except NoAnswer as failure:
            self.kill()
            raise ScorerError(f"scoring.function={spec} cannot be loaded: {failure}") from failure

    @property
    def alive(self) -> bool:
        """Whether the child can be asked."""
        return self._channel.fileno() != -1

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> list[Given]:
        """The answers to `request`. Raises NoAnswer; a child that is late or broken is dead afterwards."""
        self._send(json.dumps(request).encode(), timeout_s)
        return read_answers(self._receive(timeout_s))

    def kill(self) -> None:
        """End the child and everything that it started."""
        if not self.alive:
            return
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._relay.wait(EXIT_GRACE_S)
        if self._relay.returncode != 0:
            self._relay.kill()
            self._relay.wait()
            _end_marked(self._mark)

    def _send(self, content: bytes, timeout_s: float) -> None:
        """Whatever goes wrong is told by what is received then."""
        self._code = os.urandom(relay.CODE_BYTES)
        with suppress(OSError):
            self._channel.settimeout(timeout_s)
            self._channel.sendall(relay.frame(self._code, content))

    def _receive(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        with ExitStack() as unless_whole:
            unless_whole.callback(self.kill)
            while True:
                while received := self._frames.take():
                    code, content = received
                    if content[:1] == relay.ENDED:
                        raise NoAnswer(content[1:].decode("utf-8", "replace"))
                    if code == self._code:
                        unless_whole.pop_all()
                        return content[1:]
                self._frames.add(self._arrived(deadline - time.monotonic(), timeout_s))

    def _arrived(self, seconds: float, timeout_s: float) -> bytes:
        try:
            self._channel.settimeout(max(seconds, 1e-3))
            piece = self._channel.recv(1 << 16)
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {timeout_s:g} s") from error
        except OSError:
            piece = b""
        if not piece:
            raise NoAnswer("the process that watches over the scoring process has ended")
        return piece


def _tell(failure: _Failure) -> NoReturn:
    raise NoAnswer(one_line(failure.failure, _LONGEST_FAILURE))


def _shown(content: bytes) -> str:
    return one_line(content[: 4 * REASON_LENGTH].decode("utf-8", "replace"), REASON_LENGTH)


def _end_marked(mark: str) -> None:
    deadline = time.monotonic() + EXIT_GRACE_S
    while time.monotonic() < deadline and (found := [p for p in psutil.process_iter() if _has(p, mark)]):
        for process in found:
            with suppress(psutil.Error):
                process.kill()


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False


def child_environment(environment: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """`environment` without its secrets.

    Imports resolve as here, then in the working directory.
    """
    kept = {name: value for name, value in environment.items() if not is_secret(name, value)}
    return kept | {"PYTHONPATH": os.pathsep.join([*(entry or os.getcwd() for entry in path), os.getcwd()])}


class ProcessScorer:
    """Asks `module:function` about `batch_size` items at a time, `timeout_s` seconds per item.

    When a call raises, is late, kills its process or returns the wrong number of scores, its items are asked one by
    one; so is an item whose score is not a finite number. Only the items that fail on their own stay unscored.
    """

    def __init__(
        self,
        function: str,
        block: FunctionScoringBlock | VerifierScoringBlock,
        arguments: Callable[[Sequence[ScoringItem]], Sequence[Any]],
        *,
        grace_s: float = 0.0,
    ) -> None:
        """Load the function. `arguments` makes what it is called with, as JSON can hold it.

        A call gets `grace_s` on top of its items' seconds, for a function that keeps the deadlines itself.

        Raises ScorerError: no such module, no such function, not callable, failing import.
        """
        self._function, self._block, self._arguments = function, block, arguments
        self._grace_s = grace_s
        self._process = ScoringProcess(function)

    @property
    def file(self) -> Path:
        """Where the function is defined; Path(".") for code without a file."""
        return Path(self._process.location.file)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored.

        By default that is a share of `max_unscored`; who asks in several calls says how many the whole may still lose.
        """
        tally = _Tally(most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed)
        for batch in chunks(items, self._block.batch_size):
            self._score_batch(batch, tally)
        return tally.scores

    def close(self) -> None:
        """End the child process."""
        self._process.kill()

    def _score_batch(self, batch: Sequence[ScoringItem], tally: "_Tally") -> None:
        for item, (score, final) in zip(batch, self._ask(batch, tally), strict=True):
            again = len(batch) > 1 and not final
            tally.add(self._ask([item], tally)[0][0] if again else score)

    def _ask(self, items: Sequence[ScoringItem], tally: "_Tally") -> list[tuple[Score, bool]]:
        """Each score, and whether asking again would say the same."""
        if tally.over_limit:
            return [(skipped(self._block.max_unscored), True)] * len(items)
        if not self._process.alive:
            self._process = ScoringProcess(self._function)
        try:
            request, seconds = {"arguments": self._arguments(items)}, self._block.timeout_s * len(items)
            answers = self._process.ask(request, seconds + self._grace_s)
        except NoAnswer as failure:
            return [(Score(None, reason=str(failure)), False)] * len(items)
        if len(answers) != len(items):
            reason = f"returned {len(answers)} scores for {len(items)} completions"
            return [(Score(None, reason=reason), False)] * len(items)
        return [(Score(given.value, given.parts, given.reason), given.final) for given in answers]


@dataclass
class _Tally:
    """The scores so far. At most `allowed` of them may be unscored."""

    allowed: int
    scores: list[Score] = field(default_factory=list)
    unscored: int = 0

    @property
    def over_limit(self) -> bool:
        return self.unscored > self.allowed

    def add(self, score: Score) -> None:
        self.scores.append(score)
        self.unscored += score.value is None
