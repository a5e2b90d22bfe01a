"""One round's log: its stages are timed, shown, recorded and stored under one and the same name.

What a stage leaves behind is a file of the round's folder, with its size and hash in `stages.json`. A stage that an
earlier attempt at the round finished is not done again: its files are read instead.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from raylign.errors import RecordError
from raylign.evaluation.calibration import Calibration, draw_reliability
from raylign.evaluation.capability.measures import ItemResult, Results
from raylign.records import AnyEvaluation, Candidate, Preference, Prompt, Score
from raylign.report.console import Advance, stage_progress
from raylign.run.checkpoints import Checkpoint, Checkpoints, Metrics
from raylign.run.directory import RunDirectory
from raylign.run.files import finished_record, publish_file, publish_text, read_record
from raylign.run.fingerprints import Fingerprint, damage, fingerprints
from raylign.run.sampled import SampledFile, sampled_file
from raylign.run.tables import read_candidates, read_preferences, write_candidates, write_preferences
from raylign.tracking.tracker import Tracker

log = logging.getLogger(__name__)

STAGES_NAME = "stages.json"
SAMPLED, CANDIDATES, SCORING = "sampled{}.jsonl", "candidates{}.parquet", "scoring{}.json"
PREFERENCES, HELD_OUT, EVALUATION = "preferences.parquet", "samples.parquet", "evaluation.json"
RELIABILITY, CAPABILITY = "reliability.png", "capability.json"
_OF_THE_POLICY = ("train", "capability", "evaluate")
"""Stages whose results are those of the policy that the round trains."""
_REDO = f"remove {STAGES_NAME} beside it, and what it stands for is done again"
_METRICS: TypeAdapter[Metrics] = TypeAdapter(Metrics)
_EVALUATION: TypeAdapter[AnyEvaluation] = TypeAdapter(AnyEvaluation)
_RESULTS = TypeAdapter(dict[str, tuple[ItemResult, ...]])


@dataclass(frozen=True, slots=True)
class FinishedStage:
    """An entry of `stages.json`: the wall time of a stage, and the files it has left in the round's folder."""

    seconds: float
    files: Mapping[str, Fingerprint]


_STAGES = TypeAdapter(dict[str, FinishedStage])


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage at work. `done`: an earlier attempt finished it, what it left can be read."""

    advance: Advance
    done: bool
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trained:
    """How far the policy that a run starts from has trained the round. Made by `recipes.run`."""

    complete: bool
    steps: tuple[Metrics, ...]
    passed: bool = False
    """Whether the policy has trained on since: what the round measures of its own can no longer be had."""

    @classmethod
    def of(cls, index: int, newest: Checkpoint | None, steps: Sequence[Metrics] = ()) -> "Trained":
        """Of round `index`, from the newest checkpoint if there is one; `steps` are those of a round before its own."""
        if newest is None or newest.round < index:
            return cls(False, ())
        return cls(newest.complete, newest.steps) if newest.round == index else cls(True, tuple(steps), passed=True)


class RoundLog:
    """Made by the recipe for each round; `seconds` has the wall time of each stage so far."""

    def __init__(
        self,
        index: int,
        directory: RunDirectory,
        tracker: Tracker,
        console: Console,
        checkpoints: Checkpoints,
        trained: Trained,
    ) -> None:
        self.index, self.trained = index, trained
        self.seconds: dict[str, float] = {}
        self._directory = directory
        self._tracker, self._console, self._checkpoints = tracker, console, checkpoints
        self._finished = finished_stages(self._folder)
        if index and not trained.complete:
            self._finished = {name: entry for name, entry in self._finished.items() if name not in _OF_THE_POLICY}

    @property
    def _folder(self) -> Path:
        """The round's folder. Raises DiskError when the run directory is no longer in its place."""
        self._directory.require_in_place()
        return self._directory.round(self.index)

    @contextmanager
    def stage(self, name: str, total: int, unit: str, *, again: bool = False) -> Iterator[Stage]:
        """Time stage `name` and show its progress over `total` units; the rest counts as done at the end.

        `again` is for a stage that leaves nothing to read: every attempt does it.
        """
        known = name in self._finished or (name == "train" and self.trained.complete and self.index > 0)
        if known and not again:
            self.seconds[name] = self._finished[name].seconds if name in self._finished else 0.0
            yield Stage(lambda finished: None, done=True)
            return
        started = time.monotonic()
        with stage_progress(self._console, f"round {self.index} {name}", total, unit) as advance:
            finished_units = 0

            def count(finished: int) -> None:
                nonlocal finished_units
                finished_units += finished
                advance(finished)

            stage = Stage(count, done=False)
            yield stage
            advance(total - finished_units)
        self.seconds[name] = time.monotonic() - started
        self._finish(name, stage.files, journal=not known)

    def _finish(self, name: str, files: Sequence[str], *, journal: bool) -> None:
        self._finished[name] = FinishedStage(self.seconds[name], fingerprints(self._folder, files))
        finished = {name: asdict(stage) for name, stage in self._finished.items()}
        publish_text(self._folder / STAGES_NAME, json.dumps(finished, indent=1))
        if journal and self.index > 0:
            self._tracker.stage(self.index, name, self.seconds[name])

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record optimizer step `number` (from 1) of the round."""
        self._directory.require_in_place()
        self._tracker.step(self.index, number, metrics)

    @contextmanager
    def sampled(
        self, stage: Stage, prompts: Sequence[Prompt], versions: Sequence[int], attempt: int = 0
    ) -> Iterator[SampledFile]:
        """sampled.jsonl: candidates as they come, with those that an earlier process got; see `sampled_file`.

        Candidates of a further attempt at prompts without a pair are in sampled-1.jsonl and so on.
        """
        name = SAMPLED.format(numbered(attempt))
        with sampled_file(self._folder / name, prompts, versions) as sampled:
            stage.advance(len(prompts) - len(sampled.missing))
            yield sampled
        stage.files.append(name)

    def save_candidates(
        self,
        stage: Stage,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        scores: Sequence[Score],
        attempt: int = 0,
    ) -> None:
        """candidates.parquet: all K of every prompt, with scores.

        Of a further attempt candidates-1.parquet: all of the prompts that were sampled again, the earlier ones too.
        """
        name = CANDIDATES.format(numbered(attempt))
        write_candidates(self._folder / name, prompts, candidates, scores)
        stage.files.append(name)

    def save_scoring(self, stage: Stage, metrics: Metrics, attempt: int = 0) -> None:
        """scoring.json: what scoring the candidates took."""
        name = SCORING.format(numbered(attempt))
        publish_text(self._folder / name, json.dumps(dict(metrics), indent=1))
        stage.files.append(name)

    def read_scoring(self) -> Metrics:
        """What `save_scoring` wrote, of a further attempt as `attempt-1/scorer/metric`; nothing where it did not."""
        paths = (self._folder / SCORING.format(numbered(attempt)) for attempt in count())
        found: dict[str, float] = {}
        for attempt, path in enumerate(takewhile(Path.is_file, paths)):
            prefix = f"attempt-{attempt}/" if attempt else ""
            found |= {f"{prefix}{name}": value for name, value in read_record(path, _METRICS, _REDO).items()}
        return found

    def read_scores(self, candidates: Sequence[Candidate], attempt: int = 0) -> list[Score]:
        """Of `candidates`, in their order. Raises RecordError when the file is of others."""
        path = self._folder / CANDIDATES.format(numbered(attempt))
        scored, scores = read_candidates(path)
        if [(own.prompt_id, own.index, own.token_ids) for own in scored] != [
            (own.prompt_id, own.index, own.token_ids) for own in candidates
        ]:
            error = RecordError(f"{path} has the scores of other candidates than the round has sampled")
            error.cure = _REDO
            raise error
        return scores

    def save_preferences(self, stage: Stage, preferences: Sequence[Preference]) -> None:
        """preferences.parquet, also an MLflow artifact and data set."""
        write_preferences(self._folder / PREFERENCES, preferences)
        stage.files.append(PREFERENCES)
        self._tracker.artifact(self._folder / PREFERENCES, "preferences", self.index)

    def read_preferences(self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> tuple[Preference, ...]:
        return read_preferences(self._folder / PREFERENCES, prompts, candidates)

    @contextmanager
    def new_checkpoint(self, steps: Sequence[Metrics], complete: bool, needed_bytes: int) -> Iterator[Path]:
        """An empty folder for the policy after `steps` of this round; see `Checkpoints.new`."""
        self._directory.require_in_place()
        with self._checkpoints.new(self.index, steps, complete, needed_bytes) as folder:
            yield folder
            self._directory.require_in_place()

    def save_bad_step(self, number: int, preferences: Sequence[Preference]) -> None:
        """What step `number` would have trained on when its loss or gradient was not finite."""
        path = self._folder / f"bad-step-{number:04d}.parquet"
        write_preferences(path, preferences)
        log.warning(
            "step %d of round %d is left out: its loss or gradient is not finite; see %s", number, self.index, path
        )

    def save_held_out(
        self, stage: Stage, prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
    ) -> None:
        """samples.parquet: the held-out completions of this policy version, also an MLflow artifact."""
        write_candidates(self._folder / HELD_OUT, prompts, candidates, scores)
        stage.files.append(HELD_OUT)
        self._tracker.artifact(self._folder / HELD_OUT, "samples", self.index)

    def read_held_out(self) -> tuple[list[Candidate], list[Score]]:
        return read_candidates(self._folder / HELD_OUT)

    def read_held_out_of(self, index: int) -> tuple[list[Candidate], list[Score]] | None:
        """What `save_held_out` wrote in an earlier round; None where it wrote nothing."""
        path = self._directory.round(index) / HELD_OUT
        return read_candidates(path) if path.is_file() else None

    def save_reliability(self, stage: Stage, reliability: Calibration) -> None:
        """reliability.png: how often a reward model's predictions come true, also an MLflow artifact."""
        publish_file(self._folder / RELIABILITY, partial(draw_reliability, reliability))
        stage.files.append(RELIABILITY)
        self._tracker.artifact(self._folder / RELIABILITY, "report", self.index)

    def is_finished(self, name: str) -> bool:
        """Whether stage `name` is, by this attempt or an earlier one."""
        return name in self._finished

    def save_capability(self, stage: Stage, results: Results) -> None:
        """capability.json: what the policy says of every item of every task."""
        found = {task: [asdict(item) for item in items] for task, items in results.items()}
        publish_text(self._folder / CAPABILITY, json.dumps(found, indent=1))
        stage.files.append(CAPABILITY)

    def read_capability(self) -> Results:
        return read_record(self._folder / CAPABILITY, _RESULTS, _REDO)

    def capability_before_training(self) -> Results:
        """That of round 0; nothing in round 0 itself, and where round 0 measured none."""
        before = self._directory.round(0)
        if self.index == 0 or "capability" not in finished_stages(before):
            return {}
        return read_record(before / CAPABILITY, _RESULTS, _REDO)

    def save_evaluation(self, stage: Stage, evaluation: AnyEvaluation) -> None:
        """evaluation.json: what the held-out rows or completions came to."""
        publish_text(self._folder / EVALUATION, json.dumps(asdict(evaluation), indent=1))
        stage.files.append(EVALUATION)

    def read_evaluation(self) -> AnyEvaluation:
        return read_record(self._folder / EVALUATION, _EVALUATION, _REDO)


def candidate_files(folder: Path) -> list[Path]:
    """A round's candidates, attempt by attempt: what a later file has of a prompt stands for what earlier ones have.

    Raises RecordError when one is not what stages.json says.
    """
    files = [*takewhile(Path.is_file, (folder / CANDIDATES.format(numbered(attempt)) for attempt in count()))]
    known: dict[str, Fingerprint] = {}
    for stage in (finished_record(folder / STAGES_NAME, _STAGES) or {}).values():
        known |= stage.files
    if wrong := damage(folder, {path.name: known[path.name] for path in files if path.name in known}):
        error = RecordError(f"{folder}: {wrong}")
        error.cure = "restore it from a copy, or go on without what was learnt of its prompts: schedule.curriculum=null"
        raise error
    return files


def numbered(attempt: int) -> str:
    """What names of stages and files of a further attempt end in: nothing, -1, -2."""
    return f"-{attempt}" if attempt else ""


def finished_stages(folder: Path) -> dict[str, FinishedStage]:
    """The finished stages up to the first one whose files are damaged."""
    whole: dict[str, FinishedStage] = {}
    for name, entry in (finished_record(folder / STAGES_NAME, _STAGES) or {}).items():
        if wrong := damage(folder, entry.files):
            log.warning("%s: stage %s is done again, and those after it: %s", folder, name, wrong)
            break
        whole[name] = entry
    return whole
