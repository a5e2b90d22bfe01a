"""How far a stage is: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_S = 5.0

Advance = Callable[[int], None]


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
