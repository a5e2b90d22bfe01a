"""The parent's side of the scoring process: starts it, asks it, and ends it when it is late."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from raylign.errors import ScorerError
from raylign.tracking.params import without_credentials

START_TIMEOUT_S = 600.0
EXIT_GRACE_S = 5.0
STDERR = 2
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTHORIZATION|COOKIE", re.IGNORECASE)


class NoAnswer(Exception):
    """The scoring process gave no usable reply; the text is the reason of an unscored item."""


class ScoringProcess:
    """One child that has loaded `module:function`. It and all it starts are killed when a reply is late."""

    def __init__(self, spec: str, *, confined: bool = False) -> None:
        """Start the child and wait until the function is loaded. Raises ScorerError if that fails.

        `confined` refuses code from outside the working directory and the installed packages, before it runs.
        """
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-u", "-P", "-m", "raylign.scoring.worker", spec, str(theirs.fileno())]
        command += ["confined"] if confined else []
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=STDERR,
                pass_fds=(theirs.fileno(),),
                env=child_environment(os.environ, sys.path),
                start_new_session=True,
            )
        try:
            self.location = self._receive(START_TIMEOUT_S)
        except NoAnswer as failure:
            self.kill()
            raise ScorerError(f"scoring.function={spec} cannot be loaded: {failure}") from failure

    @property
    def alive(self) -> bool:
        """Whether the child can be asked."""
        return not self._connection.closed

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to `request`. Raises NoAnswer; a child that is late or broken is dead afterwards."""
        with suppress(OSError):
            self._connection.send_bytes(json.dumps(request).encode())
        return self._receive(timeout_s)

    def kill(self) -> None:
        """End the child and every process of its group."""
        if not self.alive:
            return
        self._connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        with ExitStack() as unless_whole:
            unless_whole.callback(self.kill)
            if not self._connection.poll(timeout_s):
                raise NoAnswer(f"no answer within {timeout_s:g} s")
            try:
                reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError) as error:
                raise NoAnswer(self._cause_of_death()) from error
            unless_whole.pop_all()
        if "failure" in reply:
            raise NoAnswer(reply["failure"])
        return reply

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return "the scoring process closed its connection"
        if code < 0:
            return f"the scoring process was killed by {signal.Signals(-code).name}"
        return f"the scoring process exited with code {code}"


def child_environment(environment: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """`environment` without variables named like secrets or holding an address with credentials.

    Imports resolve as here, then in the working directory.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if not _SECRET.search(name) and without_credentials(value) == value
    }
    return kept | {"PYTHONPATH": os.pathsep.join([*(entry or os.getcwd() for entry in path), os.getcwd()])}
