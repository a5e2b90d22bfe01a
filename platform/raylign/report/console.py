"""The console is raylign's own, progress included: all else that prints, logs, warns or draws goes into a file."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raylign.boundary.secrets import without_secrets
from raylign.report.text import escape_control

OWN = ("raylign", "actors", "recipes")
"""Packages whose log lines the console shows: INFO of the library, warnings of all."""
LOG_NAME = "libraries.log"
_LINE = "%(levelname)s %(name)s: %(message)s"
_aside: list[TextIO] = []
"""What stands in for stdout and stderr, once it was needed. Never closed: libraries hold on to it."""
_own_stdout: list[TextIO] = []

LINE_INTERVAL_S = 5.0
Advance = Callable[[int], None]


class _Aside(io.TextIOWrapper):
    """Text that a full disk does not take is lost: no library may fail because of what it only tells."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class PlainLines(logging.Formatter):
    """Text of models, servers and files in a log line can neither steer the terminal nor show secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control(without_secrets(super().format(record)), keep="\n\t")


def log_to_console() -> None:
    """Log lines of raylign go to the standard error of now, whatever stands in for it later."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines(_LINE))
    for name in OWN:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("raylign").setLevel(logging.INFO)


@contextlib.contextmanager
def libraries_aside() -> Iterator[None]:
    """Until its end, Python's stdout and stderr are a file without a name; `keep_library_log` gives it one.

    Libraries bring handlers of their own, warnings, progress bars and prints, in every version others: what reaches
    the console is chosen here by who writes, not by what. `own_stdout`, raylign's log lines and uncaught exceptions
    still reach it, and so does what native code writes when it ends the process.
    """
    if not _aside:
        # Bars in a file are no use. Ray's processes inherit this.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        stored = tempfile.TemporaryFile()  # noqa: SIM115
        file = _Aside(stored, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        handler = logging.StreamHandler(file)
        handler.setFormatter(PlainLines(f"%(asctime)s {_LINE}"))
        logging.getLogger().addHandler(handler)
        _aside.append(file)
    _own_stdout.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(_aside[0]), contextlib.redirect_stderr(_aside[0]):
            yield
    finally:
        _own_stdout.pop()


def keep_library_log(folder: Path) -> Path | None:
    """What was set aside so far, and what will be, goes to the end of `libraries.log` in `folder`; None outside."""
    if not _own_stdout:
        return None
    file, path = _aside[0], folder / LOG_NAME
    file.flush()
    with path.open("ab") as log:
        written = os.lseek(file.fileno(), 0, os.SEEK_END)
        log.write(os.pread(file.fileno(), written, 0))
        log.flush()
        os.dup2(log.fileno(), file.fileno(), inheritable=False)
    return path


def own_stdout() -> TextIO:
    """Where raylign's own output goes."""
    return _own_stdout[0] if _own_stdout else sys.stdout


@contextmanager
def stage_progress(console: Console, name: str, total: int | None, unit: str = "prompts") -> Iterator[Advance]:
    """Show the progress of stage `name`; call the yielded function with the number of `unit` just finished.

    `total` None: only the end will tell.
    """
    if not console.is_terminal:
        now = time.monotonic()
        lines = _Lines(console, name, total, unit, started=now, printed=now)
        try:
            yield lines.advance
        finally:
            lines.finish()
        return
    shown = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    columns = (*shown, TimeElapsedColumn(), TimeRemainingColumn())
    # Left alone, rich prints on the console what anyone writes to stdout while a bar is shown.
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(name, total=total)
        yield lambda finished: bar.advance(task, finished)


@dataclass
class _Lines:
    """Prints `sample 24/48 prompts`, at most once per interval, and a last line with the seconds taken."""

    console: Console
    name: str
    total: int | None
    unit: str
    started: float
    printed: float
    done: int = 0

    def advance(self, finished: int) -> None:
        self.done += finished
        now = time.monotonic()
        if now - self.printed >= LINE_INTERVAL_S and self.done != self.total:
            self.printed = now
            self._print("")

    def finish(self) -> None:
        self._print(f" in {time.monotonic() - self.started:.1f} s")

    def _print(self, ending: str) -> None:
        of = "" if self.total is None else f"/{self.total}"
        line = f"{self.name} {self.done}{of} {self.unit}{ending}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
