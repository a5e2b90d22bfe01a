"""Checkpoints of a run: written aside, verified, published whole, only then rotated; damaged ones are set aside."""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from raylign.errors import RecordError
from raylign.run.files import disk_errors, publish_folder, publish_text, read_record, require_free
from raylign.run.fingerprints import seal, sealed_damage
from raylign.run.settings import CONFIG_NAME

log = logging.getLogger(__name__)

FOLDER_NAME = "checkpoints"
PROGRESS_NAME = "progress.json"
PARTIAL = "-partial"
Metrics = Mapping[str, float]
_NO_ROOM = "free some (or lower trainer.save_total_limit), then run the same command again: nothing is lost"
_NAME = re.compile(rf"([0-9]{{4,}})({PARTIAL})?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint. Its policy has done `round` rounds if `complete`, else `steps` steps of round `round`."""

    folder: Path
    round: int
    complete: bool
    steps: tuple[Metrics, ...]
    """TRL's metrics of the steps of round `round` that it has done."""

    @property
    def rounds_done(self) -> int:
        return self.round if self.complete else self.round - 1

    def require_whole(self) -> None:
        """Raises RecordError when a file of it is not what was written."""
        if damage := sealed_damage(self.folder):
            raise RecordError(f"checkpoint {self.folder} is damaged ({damage}); `raylign resume RUN` takes another one")


@dataclass(frozen=True, slots=True)
class Progress:
    """`progress.json` of a checkpoint; see `Checkpoint`."""

    round: int
    complete: bool
    steps: tuple[Metrics, ...]


_PROGRESS = TypeAdapter(Progress)


class Checkpoints:
    """The folder `checkpoints` of a run. `0003` is the policy after round 3, `0003-partial` one in the middle of it."""

    def __init__(self, folder: Path, keep: int | None) -> None:
        """Keep the `keep` newest of the complete ones; None keeps all."""
        self._folder, self._keep = folder, keep
        self.best: int | None = None
        """A version whose checkpoint stays however old it gets."""

    @contextmanager
    def new(self, round_index: int, steps: Sequence[Metrics], complete: bool, needed_bytes: int) -> Iterator[Path]:
        """An empty folder to write into; whole and verified it becomes the newest checkpoint, then older ones go.

        Raises DiskError when less than `needed_bytes` are free or writing fails; older checkpoints then stay.
        """
        name = f"{round_index:04d}{'' if complete else PARTIAL}"
        staging, final = self._folder / f".{name}.tmp", self._folder / name
        with disk_errors(staging):
            _remove(staging)
            staging.mkdir(parents=True)
        require_free(self._folder, needed_bytes, "a checkpoint", _NO_ROOM)
        yield staging
        with disk_errors(staging):
            progress = {"round": round_index, "complete": complete, "steps": list(steps)}
            publish_text(staging / PROGRESS_NAME, json.dumps(progress))
            seal(staging)
            self._replace(staging, final)
            self._rotate(round_index, complete)

    def _replace(self, staging: Path, final: Path) -> None:
        """A folder of that name is an earlier state of the same round: out of the way first, gone afterwards."""
        old = final.with_name(f".{final.name}.old")
        _remove(old)
        if final.exists():
            final.rename(old)
        publish_folder(staging, final)
        _remove(old)

    def _rotate(self, round_index: int, complete: bool) -> None:
        if not complete:
            return
        _remove(self._folder / f"{round_index:04d}{PARTIAL}")
        if self._keep is not None:
            for old in self.complete()[: -self._keep]:
                if int(old.name) != self.best:
                    _remove(old)

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        return [path for path in self._published() if path.is_dir() and not path.name.endswith(PARTIAL)]

    def _published(self) -> list[Path]:
        """Whatever has the name of a checkpoint, oldest first."""
        return sorted((path for path in self._folder.glob("[0-9]*") if is_name(path.name)), key=_age)

    def whole(self, version: int, among: Collection[int] | None = None) -> Checkpoint:
        """The complete checkpoint of policy `version`, its files for readers of the policy being what was written.

        Raises RecordError when it is not there or damaged, naming the newest one that is whole (of `among`, if given).
        """
        folder = self._folder / f"{version:04d}"
        if damage := checkpoint_damage(folder, below=False):
            others = [path for path in self.complete() if among is None or int(path.name) in among]
            whole = next((path for path in reversed(others) if not checkpoint_damage(path, below=False)), None)
            error = RecordError(f"checkpoint {folder} is damaged: {damage}")
            other = "; no other one is whole" if whole is None else f"; the newest whole one is {int(whole.name)}"
            error.cure = f"restore it from a copy, or let `raylign resume` train round {version} again{other}"
            raise error
        return _read(folder)

    def newest(self, before: int | None = None) -> Checkpoint | None:
        """The newest good checkpoint (of a round before `before`).

        Damaged ones are renamed to `damaged-...` and named in the log.
        """
        for old in self._folder.glob(".*.old"):
            if not (final := old.with_name(old.name[1:].removesuffix(".old"))).exists():
                with disk_errors(final):
                    old.rename(final)
        for folder in reversed(self._published()):
            if before is not None and _age(folder)[0] >= before:
                continue
            damage = checkpoint_damage(folder)
            if not damage:
                return _read(folder)
            aside = _free_name(folder)
            with disk_errors(aside):
                folder.rename(aside)
            log.warning(
                "checkpoint %s is damaged (%s) and kept as %s; the one before it is taken", folder, damage, aside
            )
        return None


def is_name(name: str) -> bool:
    """Whether a round of a run, or a checkpoint, is named so: `0003`, `12345`, `0003-partial`."""
    match = _NAME.fullmatch(name)
    return match is not None and f"{int(match[1]):04d}" == match[1]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of a run: it has its progress, or stands where one does."""
    # Unlike Path's, these take a path that no file system takes for one where nothing is.
    in_run = folder.parent.name == FOLDER_NAME and os.path.isfile(folder.parent.parent / CONFIG_NAME)
    return os.path.isfile(folder / PROGRESS_NAME) or (in_run and is_name(folder.name))


def checkpoint_damage(folder: Path, *, below: bool = True) -> str:
    """What is wrong with a checkpoint; "" when it is whole. Without `below` the trainer's state is not looked at."""
    if damage := sealed_damage(folder, below=below):
        return damage
    try:
        found = _read(folder)
    except RecordError as error:
        return str(error)
    own, complete = _age(folder)
    return "" if (found.round, found.complete) == (own, complete) else f"{PROGRESS_NAME} is of round {found.round}"


def _remove(path: Path) -> None:
    """Whatever stands there; nothing where nothing does. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _age(folder: Path) -> tuple[int, bool]:
    return int(folder.name.removesuffix(PARTIAL)), not folder.name.endswith(PARTIAL)


def _free_name(folder: Path) -> Path:
    number = 0
    while (path := folder.with_name(f"damaged-{folder.name}{f'-{number}' if number else ''}")).exists():
        number += 1
    return path


def _read(folder: Path) -> Checkpoint:
    progress = read_record(folder / PROGRESS_NAME, _PROGRESS)
    return Checkpoint(folder, progress.round, progress.complete, progress.steps)
