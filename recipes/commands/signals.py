"""Ctrl-C, and SIGTERM, which clusters and service managers send before they take a machine away."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
STOPPED = os.EX_TEMPFAIL
"""Status after SIGTERM: what was done is saved, and the same command goes on with it."""

log = logging.getLogger(__name__)


@contextmanager
def terminable(grace_s: float = 0.0) -> Iterator[None]:
    """Either signal unwinds everything inside; then SystemExit, 130 after Ctrl-C and 75 after SIGTERM.

    What is open is closed in peace: further SIGTERMs are ignored, a second Ctrl-C ends the process at once, and so does
    the end of `grace_s` seconds after SIGTERM (0: no limit). A signal that is ignored outside stays ignored.
    `ray.init` inside installs a SIGTERM handler that aborts the process; `actors.cluster` puts this one back.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.SIGINT in numbers:
            signal.signal(signal.SIGINT, _end_at_once)
        if number == signal.SIGTERM and grace_s:
            signal.signal(signal.SIGALRM, _end_at_once)
            signal.setitimer(signal.ITIMER_REAL, grace_s)
        log.warning("stopping on %s; once more Ctrl-C ends without saving", signal.Signals(number).name)
        received.append(number)
        # Ray's calls let this one exception through as it is; they turn any SystemExit into SystemExit(1).
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(STOPPED if received == [signal.SIGTERM] else INTERRUPTED) from interrupt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ray's processes and the janitors see this one gone and clean up; finished stages are on disk."""
    log.warning("ending at once on %s", signal.Signals(number).name)
    os._exit(128 + (signal.SIGTERM if number == signal.SIGALRM else number))
