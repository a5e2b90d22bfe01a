"""The run directory: everything a run leaves behind, readable without raylign."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from raylign.config import RunConfig
from raylign.config.blocks import RunBlock
from raylign.errors import ConfigError, DiskError, RecordError
from raylign.evaluation.guard import Best, Decision, best_version, ended_early, measures
from raylign.records import AnyEvaluation, RoundReport
from raylign.run.checkpoints import FOLDER_NAME, PARTIAL, Checkpoint, Checkpoints, is_name
from raylign.run.files import disk_errors, finished_record, publish_text, read_record, say_once
from raylign.run.settings import CONFIG_NAME, read_settings, settings_text
from raylign.tracking.facts import flatten

REPORT_NAME, GUARD_NAME = "report.json", "guard.json"
LOCK_NAME = "run.lock"


@dataclass(frozen=True, slots=True)
class Baseline:
    """`report.json` of round 0: the evaluation before training."""

    evaluation: AnyEvaluation


_REPORT, _BASELINE = TypeAdapter(RoundReport), TypeAdapter(Baseline)
_DECISIONS = TypeAdapter(tuple[Decision, ...])
_BASELINE_CURE = (
    "restore it from a copy; or begin another run from the trained policy: `raylign export RUN --to DIR --merge`, then "
    "run.name=... model.path=DIR"
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths under one run: config.yaml, rounds/0001/, checkpoints/0001/, events.jsonl.

    `identity` is the folder's device and inode when it was opened; None where nobody looked.
    """

    path: Path
    identity: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder that was opened still stands there."""
        return self.identity is None or _identity(self.path) == self.identity

    def require_in_place(self) -> None:
        """Raises DiskError when the folder was moved, deleted or replaced: another one must not grow in its place."""
        if not self.is_in_place:
            error = DiskError(f"{self.path} was moved or deleted while this run was at work in it")
            error.cure = (
                "move it back to its place, or restore it there, then run the same command again; it goes on with what "
                "the folder has"
            )
            raise error

    def round(self, index: int) -> Path:
        """Folder of round `index`; round 0 holds the evaluation before training."""
        return self.path / "rounds" / f"{index:04d}"

    def checkpoint(self, version: int) -> Path:
        """Folder with the weights of policy version `version`: a PEFT adapter, or model.safetensors."""
        return self.path / FOLDER_NAME / f"{version:04d}"

    def checkpoint_store(self, keep: int | None) -> Checkpoints:
        """Where checkpoints are made and found; `keep` of them stay."""
        return Checkpoints(self.path / FOLDER_NAME, keep)

    def whole_checkpoint(self, version: int, among: Collection[int] | None = None) -> Checkpoint:
        """The checkpoint of policy version `version`, for whoever reads the policy: its files are as they were written.

        Raises RecordError, naming the newest version (of `among`, if given) whose files are.
        """
        return self.checkpoint_store(None).whole(version, among)

    def checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return self.checkpoint_store(None).complete()

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The resolved config the run goes on with, after `overrides` (KEY=VALUE).

        Raises ConfigError when it is not what the run has written.
        """
        return read_settings(self.path / CONFIG_NAME, overrides)

    @contextmanager
    def locked(self, cure: str = "wait for it, or give this run another name (run.name=...)") -> Iterator[None]:
        """Only one process works on a run. Raises ConfigError when another one does; its end, however, frees it."""
        lock = FileLock(self.path / LOCK_NAME)
        with disk_errors(self.path / LOCK_NAME):
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise ConfigError(f"{self.path} is being worked on by another process; {cure}") from error
        with lock:
            yield

    def write_config(self, config: RunConfig) -> None:
        self.require_in_place()
        publish_text(self.path / CONFIG_NAME, settings_text(config))

    def write_baseline(self, evaluation: AnyEvaluation) -> None:
        self.require_in_place()
        publish_text(self.round(0) / REPORT_NAME, json.dumps({"evaluation": asdict(evaluation)}, indent=1))

    def write_report(self, report: RoundReport) -> None:
        self.require_in_place()
        publish_text(self.round(report.index) / REPORT_NAME, json.dumps(asdict(report), indent=1))

    def write_decisions(self, index: int, decisions: tuple[Decision, ...]) -> None:
        self.require_in_place()
        publish_text(self.round(index) / GUARD_NAME, _DECISIONS.dump_json(decisions, indent=1).decode())

    def decisions(self, index: int) -> tuple[Decision, ...] | None:
        """What the guard did after round `index`; None where it was not asked.

        Raises RecordError when that cannot be read: the rounds after it trained by it.
        """
        path = self.round(index) / GUARD_NAME
        return read_record(path, _DECISIONS) if path.exists() else None

    def decisions_before(self, index: int) -> list[Decision]:
        """What the guard did after all rounds before that one, in order: by it round `index` was trained."""
        return [made for earlier in range(1, index) for made in self.decisions(earlier) or ()]

    def baseline(self) -> AnyEvaluation:
        """The evaluation before round 1. Raises RecordError when it cannot be read."""
        return read_record(self.round(0) / REPORT_NAME, _BASELINE, _BASELINE_CURE).evaluation

    def baseline_lost(self) -> RecordError:
        """For the evaluation before round 1 that is not whole while the policy has been trained since."""
        error = RecordError(f"{self.round(0)}: the evaluation before round 1 is damaged, and cannot be done again now")
        error.cure = _BASELINE_CURE
        return error

    def reports(self) -> list[RoundReport]:
        """Reports of the finished rounds, in order; a round whose report cannot be read is not finished, and said."""
        found = {index: self._report(index) for index in self._rounds()}
        return [report for _, report in sorted(found.items()) if report is not None]

    def rounds_finished(self) -> int:
        """How many rounds, from the first, have a report."""
        return next(index for index in count() if self._report(index + 1) is None)

    def best(self, config: RunConfig) -> Best | None:
        """The best version of the finished rounds, as `config` chooses it; None where it chooses none."""
        reports = self.reports()[: self.rounds_finished()]
        if config.choice is None or not reports:
            return None
        return best_version(config.choice, measures(self.baseline(), reports))

    def ended_early(self, config: RunConfig) -> str | None:
        """Why the run does not go on after its newest finished round, as `config` has it; None where it does."""
        reports = self.reports()[: self.rounds_finished()]
        if not (config.rules or config.choice) or not reports:
            return None
        newest = self.decisions(reports[-1].index) or ()
        return ended_early(config.rules, config.choice, newest, measures(self.baseline(), reports))

    def finished_round(self, version: int | None) -> RoundReport:
        """The report of policy `version`, or of the newest one that still has a checkpoint. Raises ConfigError."""
        kept = {int(path.name) for path in self.checkpoints()}
        reports = {report.policy_version: report for report in self.reports() if report.policy_version in kept}
        if not reports:
            raise ConfigError(f"{self.path}: no finished round with a checkpoint; let the run finish a round first")
        wanted = max(reports) if version is None else version
        if wanted not in reports:
            known = ", ".join(str(number) for number in sorted(reports))
            raise ConfigError(
                f"{self.path}: no checkpoint of a finished round for version {wanted}; there are: {known} "
                "(trainer.save_total_limit says how many a run keeps)"
            )
        return reports[wanted]

    def _rounds(self) -> Iterator[int]:
        names = (path.name for path in (self.path / "rounds").glob("[0-9]*"))
        return (int(name) for name in names if is_name(name) and not name.endswith(PARTIAL) and int(name))

    def _report(self, index: int) -> RoundReport | None:
        path = self.round(index) / REPORT_NAME
        report = finished_record(path, _REPORT)
        if report is None or report.index == index:
            return report
        say_once(f"{path} is of round {report.index}, so round {index} counts as not finished; restore it from a copy")
        return None


def run_path(block: RunBlock) -> Path:
    """Where the run directory stands, absolute."""
    return (block.dir / block.name).absolute()


def require_continuable(config: RunConfig) -> None:
    """Raises ConfigError when the run directory of `config` is that of a run with other settings, which it names.

    Also when there is none and none can be made. Leaves nothing behind.
    """
    path = run_path(config.run)
    if not (path / CONFIG_NAME).is_file():
        _require_place(path)
        return
    if changed := differences(RunDirectory(path).config(), config):
        lines = "".join(f"\n  {line}" for line in changed)
        raise ConfigError(
            f"{path} exists already, with other settings:{lines}\nGive this run another name (run.name=...), or change "
            f"the settings of that one on purpose: raylign resume {path} KEY=VALUE ..."
        )


def continue_or_create(config: RunConfig) -> RunDirectory:
    """The run directory of `config`: a new one, or that of an earlier call with the same settings.

    Raises ConfigError when the settings differ, or when it cannot be written.
    """
    path = run_path(config.run)
    if not (path / CONFIG_NAME).is_file():
        return create_run(config.run, config)
    require_continuable(config)
    return _opened(path)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every setting that differs, but for where the run directory stands."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [key for key in dict.fromkeys([*before, *after]) if key != "run.dir"]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def create_run(block: RunBlock, config: RunConfig) -> RunDirectory:
    """A new run directory with the resolved config. Raises ConfigError when it exists or cannot be written."""
    path = run_path(block)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        _require_no_other(path)
        publish_text(path / CONFIG_NAME, settings_text(config))
    return _opened(path)


def _require_place(path: Path) -> None:
    """Raises ConfigError when no run can begin at `path`."""
    with _writing(path):
        if path.exists():
            _require_no_other(path)
        else:
            nearest = next(folder for folder in path.parents if folder.exists())
            # Access rights do not tell of everything that refuses a folder.
            TemporaryDirectory(prefix=".raylign-", dir=nearest).cleanup()


def _require_no_other(path: Path) -> None:
    if any(entry.name != LOCK_NAME for entry in path.iterdir()):
        raise ConfigError(
            f"{path} exists already and is no run (no {CONFIG_NAME}); name the run otherwise (run.name=...)"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; set run.dir to a writable folder") from error


def open_run(path: Path) -> RunDirectory:
    """An existing run directory. Raises ConfigError when `path` is none."""
    if not os.path.isfile(path / CONFIG_NAME):
        raise ConfigError(f"{path} is no run directory: it has no {CONFIG_NAME}")
    return _opened(path.absolute())


def _opened(path: Path) -> RunDirectory:
    return RunDirectory(path, _identity(path))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
