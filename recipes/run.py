"""What every recipe needs around its loop: run directory, checkpoints, tracking, a summary."""

import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from raylign.boundary.secrets import without_credentials
from raylign.config import RunConfig
from raylign.errors import DiskError, RaylignError, Waiting
from raylign.evaluation.capability.likelihood import Measured
from raylign.evaluation.guard import (
    Measures,
    best_version,
    decide,
    ended_early,
    measures,
    over_optimisation,
)
from raylign.prompts import InvalidRows, set_aside
from raylign.records import AnyEvaluation, Preference, RoundReport
from raylign.report.console import keep_library_log
from raylign.report.record import read_run
from raylign.report.summary import headline, rounds_table
from raylign.report.tables import Sample, report_console, samples_block
from raylign.report.text import escape_control
from raylign.report.verdict import verdict
from raylign.roles import Trainers
from raylign.run.checkpoints import Checkpoint, Metrics
from raylign.run.directory import REPORT_NAME, RunDirectory, require_continuable, run_path
from raylign.run.files import publish_text
from raylign.run.inputs import Rows
from raylign.run.rounds import RoundLog, Trained, finished_stages
from raylign.run.settings import CONFIG_NAME
from raylign.tracking.facts import run_facts
from raylign.tracking.feed import load_state
from raylign.tracking.host import host_watched
from raylign.tracking.journal import JOURNAL_NAME, read_events
from raylign.tracking.tracker import Status, Tracker
from raylign.tracking.uri import default_uri
from raylign.training.schedule import steps_per_round

log = logging.getLogger(__name__)
_NUMBER, _METRICS = TypeAdapter(int), TypeAdapter(dict[str, float | None])
_CLOSE_S: dict[Status, float] = {"FINISHED": 30.0, "SCHEDULED": 30.0, "FAILED": 10.0, "KILLED": 5.0}
"""How long MLflow is waited for at the end; a signal's grace time is short."""


class RowSource(Rows, Protocol):
    """Prompts or examples of a run, and where they come from."""

    @property
    def source(self) -> str: ...
    @property
    def invalid(self) -> Sequence[InvalidRows]: ...


class Run:
    """A run as its driver sees it: what is done, every record it writes, and the summary at its end."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        tracker: Tracker,
        console: Console,
        tasks: Sequence[Measured] = (),
    ) -> None:
        from actors.supervision.incidents import Incidents  # noqa: PLC0415 - Ray, which `raylign plan` does without

        self.directory, self.tasks = directory, tasks
        self._config, self._tracker, self._console = config, tracker, console
        self.incidents = Incidents(config.recovery, tracker.incident)
        self._checkpoints = directory.checkpoint_store(config.trainer.save_total_limit)
        self._newest = self._usable_checkpoint()
        self._evaluations: list[AnyEvaluation] = []
        self._reports = [report for report in directory.reports() if report.index <= self._rounds_done()]
        self._samples: list[Sequence[Sample]] = []
        self._journaled = {(event.name, event.round) for event in read_events(directory.path / JOURNAL_NAME)}

    def _usable_checkpoint(self) -> Checkpoint | None:
        """The newest good one, unless an unfinished round up to its own has lost what only an earlier policy can give.

        These are samples or preferences (rows of a data set would be the same again), and the evaluation of a version
        before it.
        """
        newest = self._checkpoints.newest()
        if newest is None:
            return None
        sampled = self._config.on_policy
        for index in range(self.directory.rounds_finished() + 1, newest.round + 1):
            needed = ({"reference"} if sampled else set()) | ({"evaluate"} if index < newest.round else set())
            if not needed <= finished_stages(self.directory.round(index)).keys():
                return self._checkpoints.newest(before=index)
        return newest

    def _rounds_done(self) -> int:
        """Rounds with a report whose policy, or a later one, has a good checkpoint."""
        trained = self._newest.rounds_done if self._newest else 0
        return min(self.directory.rounds_finished(), trained)

    def open_record(self, rows: RowSource, split: str) -> None:
        """Say what the run is and goes without, and what an earlier process did not come to say of its last round."""
        self._tracker.run_started(self._config, run_facts())
        if ("prompts", None) not in self._journaled:
            counts = {"train": len(rows.train), "held_out": len(rows.held_out)}
            self._tracker.prompts(rows.source, split, rows.digest, counts)
        if note := set_aside(rows.invalid, self.directory.path):
            self.say(note)
        self._tracker.artifact(self.directory.path / CONFIG_NAME, "config")
        for report in self._reports:
            self._journal(report)

    def _journal(self, report: RoundReport) -> None:
        """Once, also where a damaged checkpoint made a round be trained again."""
        if ("round_finished", report.index) not in self._journaled:
            self._tracker.round_finished(report)

    def rounds_to_do(self) -> Iterator[int]:
        """Rounds that are not finished, in order, until one ends the run early."""
        for index in range(len(self._reports) + 1, self._config.rounds + 1):
            if self._ended_early():
                return
            yield index

    def _measures(self) -> list[Measures]:
        return measures(self._evaluations[0], self._reports)

    def _ended_early(self) -> str | None:
        if not self._reports:
            return None
        newest = self.directory.decisions(self._reports[-1].index) or ()
        return ended_early(self._config.rules, self._config.choice, newest, self._measures())

    def ends_with(self, report: RoundReport) -> bool:
        """Whether the run will not go on after the round of `report`, which is not on record yet."""
        rules, choice = self._config.rules, self._config.choice
        if report.index == self._config.rounds or not (rules or choice):
            return report.index == self._config.rounds
        measured = measures(self._evaluations[0], [*self._reports, report])
        made = self.directory.decisions(report.index)
        newest = decide(rules, measured[-1], report.index) if made is None else made
        return ended_early(rules, choice, newest, measured) is not None

    def _judge(self) -> None:
        """What the newest round's report leads to: decisions of the guard, once, and the version that is kept."""
        if not self._reports or not self._evaluations:
            return
        index, measured = self._reports[-1].index, self._measures()
        if self._config.rules and self.directory.decisions(index) is None:
            made = decide(self._config.rules, measured[-1], index)
            self.directory.write_decisions(index, made)
            for decision in made:
                self.say(f"round {index}: guard: {decision.told}")
        self._journal_decisions(index)
        if choice := self._config.choice:
            best = best_version(choice, measured)
            self._checkpoints.best = None if best is None else best.version

    def _journal_decisions(self, index: int) -> None:
        if ("guard", index) not in self._journaled and (made := self.directory.decisions(index)):
            self._tracker.guard(index, [decision.told for decision in made])

    def round_log(self, index: int) -> RoundLog:
        """The log of round `index`; 0 is the evaluation before training.

        Raises RecordError when that is damaged and the policy it was of is trained by now.
        """
        self.incidents.begin_round(index)
        if index:
            self._tracker.round_started(index)
        elif self._newest and "evaluate" not in finished_stages(self.directory.round(0)):
            raise self.directory.baseline_lost()
        trained = Trained.of(index, self._newest, self._steps_on_record(index))
        return RoundLog(index, self.directory, self._tracker, self._console, self._checkpoints, trained)

    def _steps_on_record(self, index: int) -> list[Metrics]:
        """Of a round before the newest checkpoint whose report is gone, the steps as the journal has them."""
        if not (index and self._newest and index < self._newest.round):
            return []
        events = (event for event in read_events(self.directory.path / JOURNAL_NAME) if event.round == index)
        steps = {event.get("step", _NUMBER): event.get("metrics", _METRICS) for event in events if event.name == "step"}
        # What was not finite is null there.
        return [
            {name: math.nan if value is None else value for name, value in metrics.items()}
            for _, metrics in sorted(steps.items())
        ]

    @property
    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from."""
        return self._newest

    def restore(self, trainers: Trainers) -> None:
        """The trainer as the newest checkpoint has it."""
        trainers.restore(newest := self._newest)
        if newest:
            done = f"round {newest.round}" if newest.complete else f"{len(newest.steps)} steps of round {newest.round}"
            self.say(f"going on after {done}, from {newest.folder}")

    def finish_baseline(self, evaluation: AnyEvaluation, samples: Sequence[Sample] = ()) -> None:
        """Record the evaluation before round 1."""
        self._evaluations.append(evaluation)
        self._samples.append(samples)
        self.directory.write_baseline(evaluation)
        if ("evaluation", 0) not in self._journaled:
            self._tracker.baseline(evaluation)
        self.say(f"round 0: {headline(evaluation)}")
        self._judge()

    def finish_round(self, report: RoundReport, samples: Sequence[Sample] = ()) -> None:
        """Record the round; a round without this call has not happened."""
        self._reports.append(report)
        self._samples.append(samples)
        self.directory.write_report(report)
        self._journal(report)
        self.say(
            f"round {report.index}: {headline(report.evaluation)}, {report.counts['preferences']} preferences, "
            f"{sum(report.seconds.values()):.0f} s"
        )
        for note in over_optimisation([*self._evaluations, *(own.evaluation for own in self._reports)]):
            self.say(f"round {report.index}: {note}")
        self._judge()

    def summary(self) -> None:
        """Samples before and after, the table of rounds, the verdict and what may be wrong."""
        if not self._reports:
            return
        baseline = self._evaluations[0]
        if self._samples[0] and len(self._samples) > 1:
            self._console.print(samples_block("held-out samples", self._samples[0], self._samples[-1]))
        self._console.print(rounds_table(baseline, self._reports))
        found = verdict(read_run(self.directory))
        self.say(found.sentence)
        for note in found.notes:
            self.say(f"note: {note}")
        for outcome in found.outcomes:
            self.say(outcome)
        self.say(f"results: {self.directory.path}")
        self._say_where(default_uri(self._config.tracking, self.directory.path))
        self.say(f"report:  raylign review show {self.directory.path}")
        self.say(f"export:  raylign export {self.directory.path} --to DIR")

    def keep_report(self, text: str) -> None:
        """report.json of a run without rounds, written last; also an MLflow artifact."""
        self.directory.require_in_place()
        publish_text(self.directory.path / REPORT_NAME, text)
        self._tracker.artifact(self.directory.path / REPORT_NAME, "report")

    def _say_where(self, uri: str) -> None:
        """The run's page: MLflow opens on its pages for agents where an address does not ask for training runs."""
        state, served = load_state(self.directory.path, uri), uri.startswith("http")
        if not served:
            self.say(f"MLflow:  mlflow ui --backend-store-uri {uri}")
        if state.run_id:
            base = without_credentials(uri).rstrip("/") if served else "http://127.0.0.1:5000"
            place = f"experiments/{state.experiment_id}/runs/{state.run_id}"
            self.say(f"page:    {base}/#/{place}?workflowType=machine_learning")

    def say(self, line: str) -> None:
        self._console.print(Text(escape_control(line)), soft_wrap=True)


def train_steps(
    log: RoundLog, preferences: Sequence[Preference], trainers: Trainers, config: RunConfig
) -> list[Metrics]:
    """Every optimizer step of the round by `config.objective`, then its checkpoint."""
    with log.stage("train", steps_per_round(len(preferences), config.trainer), "steps") as stage:
        if stage.done:
            return list(log.trained.steps)
        trainers.take_loss(config.objective)
        return trainers.train_round(preferences, config.run.seed + log.index, log, stage.advance)


def finished_before(config: RunConfig) -> RunDirectory | None:
    """The run directory of `config` if all its rounds are done, which it says; None when there is something to do."""
    require_continuable(config)
    directory = RunDirectory(run_path(config.run))
    early = None
    if directory.rounds_finished() < config.rounds and not (early := directory.ended_early(config)):
        return None
    console = report_console()
    console.print(rounds_table(directory.baseline(), directory.reports()))
    done = f"all {config.rounds} rounds are done" if early is None else f"the run has ended early, {early}"
    console.print(Text(f"{done}: {directory.path}"), soft_wrap=True)
    return directory


def starting(directory: RunDirectory, actor_logs: Path) -> str:
    """The first line of a start: where to read what libraries say, which is kept from the console."""
    kept = keep_library_log(directory.path)
    here = f", this process's in {kept}" if kept else ""
    return f"starting; actor logs are in {actor_logs}{here}"


@contextmanager
def recorded(tracker: Tracker, directory: RunDirectory) -> Iterator[None]:
    """Give the run its true final status, whatever ends it.

    Raises DiskError in the place of what follows from a run directory that was moved or deleted.
    """
    status: Status = "FAILED"
    try:
        with host_watched(tracker, directory.path):
            yield
        directory.require_in_place()
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    except Waiting:
        status = "SCHEDULED"
        raise
    except Exception as error:
        try:
            directory.require_in_place()
        except DiskError as moved:
            raise moved from error
        raise
    finally:
        _close(tracker, status, directory)


def _close(tracker: Tracker, status: Status, directory: RunDirectory) -> None:
    try:
        missing = tracker.close(status, _CLOSE_S[status])
    except RaylignError as error:
        if directory.is_in_place:
            raise
        log.warning("MLflow may miss events of this run: %s", error)
        return
    if missing:
        log.warning(
            "MLflow misses %d event(s) of this run, all of them safe in %s; once it answers: raylign sync %s",
            missing,
            directory.path / JOURNAL_NAME,
            shlex.quote(str(directory.path)),
        )
