"""One round's log: its stages are timed, shown, recorded and stored under one and the same name."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console

from raylign.progress import Advance, stage_progress
from raylign.records import Candidate, Preference, Prompt, Score
from raylign.rundir import RunDirectory
from raylign.store import write_candidates, write_preferences
from raylign.tracking.tracker import Tracker

NOT_YET_SCORED = Score(None, reason="not scored yet")


class RoundLog:
    """Made by the recipe for each round; `seconds` has the wall time of each stage so far."""

    def __init__(self, index: int, directory: RunDirectory, tracker: Tracker, console: Console) -> None:
        self.index = index
        self.seconds: dict[str, float] = {}
        self._folder = directory.round(index)
        self._tracker, self._console = tracker, console

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """Time stage `name` and show its progress over `total` units; the rest counts as done at the end."""
        started = time.monotonic()
        with stage_progress(self._console, f"round {self.index} {name}", total, unit) as advance:
            done = 0

            def count(finished: int) -> None:
                nonlocal done
                done += finished
                advance(finished)

            yield count
            advance(total - done)
        self.seconds[name] = time.monotonic() - started
        if self.index > 0:
            self._tracker.stage(self.index, name, self.seconds[name])

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record optimizer step `number` (from 1) of the round."""
        self._tracker.step(self.index, number, metrics)

    def save_candidates(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None:
        """candidates.parquet: all K of every prompt, with scores."""
        write_candidates(self._folder / "candidates.parquet", prompts, candidates, scores)

    def save_preferences(self, preferences: Sequence[Preference]) -> None:
        """preferences.parquet, also an MLflow artifact and data set."""
        path = self._folder / "preferences.parquet"
        write_preferences(path, preferences)
        self._tracker.artifact(path, "preferences", self.index)

    def save_held_out(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None:
        """samples.parquet: the held-out completions of this policy version, also an MLflow artifact."""
        path = self._folder / "samples.parquet"
        write_candidates(path, prompts, candidates, scores)
        self._tracker.artifact(path, "samples", self.index)
