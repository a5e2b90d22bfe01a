"""Ctrl-C, and SIGTERM, which clusters and service managers send before they take a machine away."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT

log = logging.getLogger(__name__)


@contextmanager
def terminable() -> Iterator[None]:
    """Either signal unwinds everything inside and becomes SystemExit(128 + its number); once is enough.

    Later signals are ignored, so that what is open is closed in peace; one that is ignored outside stays ignored.
    `ray.init` inside installs a SIGTERM handler that aborts the process; `actors.cluster` puts this one back.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        log.warning("stopping on %s", signal.Signals(number).name)
        received.append(number)
        # Ray's calls let this one exception through as it is; they turn any SystemExit into SystemExit(1).
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + (received or [signal.SIGINT])[0]) from interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
