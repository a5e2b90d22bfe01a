"""The run directory: everything a run leaves behind, readable without raylign."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylign.config import RunConfig, dump_config, load_config
from raylign.config.blocks import RunBlock
from raylign.errors import ConfigError
from raylign.files import publish_folder, publish_text
from raylign.records import Evaluation, RoundReport

CONFIG_NAME = "config.yaml"
REPORT_NAME = "report.json"


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

    @contextmanager
    def new_checkpoint(self, version: int, keep: int | None) -> Iterator[Path]:
        """An empty folder to write into; it appears whole as `checkpoint(version)` and only then older ones go."""
        staging = self.path / "checkpoints" / f".{version:04d}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        publish_folder(staging, self.checkpoint(version))
        if keep is not None:
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))

    def config(self) -> RunConfig:
        """The resolved config the run was started with."""
        return load_config(self.path / CONFIG_NAME)

    def write_baseline(self, evaluation: Evaluation) -> None:
        publish_text(self.round(0) / REPORT_NAME, json.dumps({"evaluation": asdict(evaluation)}, indent=1))

    def write_report(self, report: RoundReport) -> None:
        publish_text(self.round(report.index) / REPORT_NAME, json.dumps(asdict(report), indent=1))

    def reports(self) -> list[RoundReport]:
        """Reports of the finished rounds, in order."""
        paths = {int(path.parent.name): path for path in (self.path / "rounds").glob(f"[0-9]*/{REPORT_NAME}")}
        return [_report(json.loads(paths[index].read_text())) for index in sorted(paths) if index > 0]


def _report(raw: dict[str, Any]) -> RoundReport:
    return RoundReport(**raw | {"evaluation": Evaluation(**raw["evaluation"]), "steps": tuple(raw["steps"])})


def create_run(block: RunBlock, config: RunConfig) -> RunDirectory:
    """A new run directory with the resolved config. Raises ConfigError when it exists or cannot be written."""
    path = (block.dir / block.name).absolute()
    try:
        path.mkdir(parents=True)
        publish_text(path / CONFIG_NAME, dump_config(config))
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already; give the run another name (run.name=...) or remove it") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; set run.dir to a writable folder") from error
    return RunDirectory(path)


def open_run(path: Path) -> RunDirectory:
    """An existing run directory. Raises ConfigError when `path` is none."""
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"{path} is no run directory: it has no {CONFIG_NAME}")
    return RunDirectory(path.absolute())
