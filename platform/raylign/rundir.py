"""The run directory: everything a run leaves behind, readable without raylign."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raylign.checkpoints import Checkpoints
from raylign.config import RunConfig, dump_config, load_recipe
from raylign.config.blocks import RunBlock
from raylign.errors import ConfigError
from raylign.files import publish_text
from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation, RoundReport
from raylign.tracking.params import flatten

CONFIG_NAME = "config.yaml"
REPORT_NAME = "report.json"
LOCK_NAME = "run.lock"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths under one run: config.yaml, rounds/0001/, checkpoints/0001/, events.jsonl."""

    path: Path

    def round(self, index: int) -> Path:
        """Folder of round `index`; round 0 holds the evaluation before training."""
        return self.path / "rounds" / f"{index:04d}"

    def checkpoint(self, version: int) -> Path:
        """Folder with the weights of policy version `version`: a PEFT adapter, or model.safetensors."""
        return self.path / "checkpoints" / f"{version:04d}"

    def checkpoint_store(self, keep: int | None) -> Checkpoints:
        """Where checkpoints are made and found; `keep` of them stay."""
        return Checkpoints(self.path / "checkpoints", keep)

    def checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return self.checkpoint_store(None).complete()

    def config(self) -> RunConfig:
        """The resolved config the run was started with."""
        return load_recipe(self.path / CONFIG_NAME)

    @contextmanager
    def locked(self, cure: str = "wait for it, or give this run another name (run.name=...)") -> Iterator[None]:
        """Only one process works on a run. Raises ConfigError when another one does; its end, however, frees it."""
        lock = FileLock(self.path / LOCK_NAME)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ConfigError(f"{self.path} is being worked on by another process; {cure}") from error
        with lock:
            yield

    def write_config(self, config: RunConfig) -> None:
        publish_text(self.path / CONFIG_NAME, dump_config(config))

    def write_baseline(self, evaluation: AnyEvaluation) -> None:
        publish_text(self.round(0) / REPORT_NAME, json.dumps({"evaluation": asdict(evaluation)}, indent=1))

    def write_report(self, report: RoundReport) -> None:
        publish_text(self.round(report.index) / REPORT_NAME, json.dumps(asdict(report), indent=1))

    def baseline(self) -> AnyEvaluation:
        """The evaluation before round 1."""
        raw = json.loads((self.round(0) / REPORT_NAME).read_text())
        return read_evaluation(raw["evaluation"])

    def reports(self) -> list[RoundReport]:
        """Reports of the finished rounds, in order."""
        return [
            _report(json.loads(path.read_text())) for index, path in sorted(self._report_paths().items()) if index > 0
        ]

    def rounds_finished(self) -> int:
        """How many rounds, from the first, have a report."""
        found = self._report_paths()
        return next(index for index in count() if index + 1 not in found)

    def _report_paths(self) -> dict[int, Path]:
        return {int(path.parent.name): path for path in (self.path / "rounds").glob(f"[0-9]*/{REPORT_NAME}")}


def read_evaluation(raw: Mapping[str, Any]) -> AnyEvaluation:
    """An evaluation of either kind from its JSON form."""
    return HeldOutEvaluation(**raw) if "metric" in raw else Evaluation(**raw)


def _report(raw: dict[str, Any]) -> RoundReport:
    return RoundReport(**raw | {"evaluation": read_evaluation(raw["evaluation"]), "steps": tuple(raw["steps"])})


def require_continuable(config: RunConfig) -> None:
    """Raises ConfigError when the run directory of `config` is that of a run with other settings; names them."""
    path = (config.run.dir / config.run.name).absolute()
    if not (path / CONFIG_NAME).is_file():
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
    path = (config.run.dir / config.run.name).absolute()
    if not (path / CONFIG_NAME).is_file():
        return create_run(config.run, config)
    require_continuable(config)
    return RunDirectory(path)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every setting that differs, but for where the run directory stands."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [key for key in dict.fromkeys([*before, *after]) if key != "run.dir"]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def create_run(block: RunBlock, config: RunConfig) -> RunDirectory:
    """A new run directory with the resolved config. Raises ConfigError when it exists or cannot be written."""
    path = (block.dir / block.name).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(entry.name != LOCK_NAME for entry in path.iterdir()):
            raise ConfigError(
                f"{path} exists already and is no run (no {CONFIG_NAME}); name the run otherwise (run.name=...)"
            )
        publish_text(path / CONFIG_NAME, dump_config(config))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; set run.dir to a writable folder") from error
    return RunDirectory(path)


def open_run(path: Path) -> RunDirectory:
    """An existing run directory. Raises ConfigError when `path` is none."""
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"{path} is no run directory: it has no {CONFIG_NAME}")
    return RunDirectory(path.absolute())
