"""Checkpoints of a run: written aside, verified, published whole, only then rotated; damaged ones are set aside."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raylign.errors import DiskError
from raylign.files import disk_errors, publish_folder, publish_text
from raylign.fingerprints import seal, sealed_damage

log = logging.getLogger(__name__)

PROGRESS_NAME = "progress.json"
PARTIAL = "-partial"
Metrics = Mapping[str, float]


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


class Checkpoints:
    """The folder `checkpoints` of a run. `0003` is the policy after round 3, `0003-partial` one in the middle of it."""

    def __init__(self, folder: Path, keep: int | None) -> None:
        """Keep the `keep` newest of the complete ones; None keeps all."""
        self._folder, self._keep = folder, keep

    @contextmanager
    def new(self, round_index: int, steps: Sequence[Metrics], complete: bool, needed_bytes: int) -> Iterator[Path]:
        """An empty folder to write into; whole and verified it becomes the newest checkpoint, then older ones go.

        Raises DiskError when less than `needed_bytes` are free or writing fails; older checkpoints then stay.
        """
        name = f"{round_index:04d}{'' if complete else PARTIAL}"
        staging, final = self._folder / f".{name}.tmp", self._folder / name
        with disk_errors(staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        require_free(self._folder, needed_bytes)
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
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        publish_folder(staging, final)
        shutil.rmtree(old, ignore_errors=True)

    def _rotate(self, round_index: int, complete: bool) -> None:
        if not complete:
            return
        shutil.rmtree(self._folder / f"{round_index:04d}{PARTIAL}", ignore_errors=True)
        if self._keep is not None:
            for old in self.complete()[: -self._keep]:
                shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        return sorted((p for p in self._folder.glob("[0-9]*") if p.name.isdigit()), key=lambda path: int(path.name))

    def newest(self, before: int | None = None) -> list[Checkpoint]:
        """The newest good checkpoint (of a round before `before`), or nothing.

        Damaged ones are renamed to `damaged-...` and named in the log.
        """
        for old in self._folder.glob(".*.old"):
            if not (final := old.with_name(old.name[1:].removesuffix(".old"))).exists():
                old.rename(final)
        candidates = [path for path in self._folder.glob("[0-9]*") if path.name.removesuffix(PARTIAL).isdigit()]
        candidates = [path for path in candidates if before is None or _age(path)[0] < before]
        for folder in sorted(candidates, key=_age, reverse=True):
            damage = sealed_damage(folder)
            if not damage:
                return [_read(folder)]
            aside = _free_name(folder)
            folder.rename(aside)
            log.warning(
                "checkpoint %s is damaged (%s) and kept as %s; the one before it is taken", folder, damage, aside
            )
        return []


def _age(folder: Path) -> tuple[int, bool]:
    return int(folder.name.removesuffix(PARTIAL)), not folder.name.endswith(PARTIAL)


def _free_name(folder: Path) -> Path:
    number = 0
    while (path := folder.with_name(f"damaged-{folder.name}{f'-{number}' if number else ''}")).exists():
        number += 1
    return path


def _read(folder: Path) -> Checkpoint:
    raw = json.loads((folder / PROGRESS_NAME).read_text())
    return Checkpoint(folder, raw["round"], raw["complete"], tuple(raw["steps"]))


def require_free(folder: Path, needed: int) -> None:
    """Raises DiskError when the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder}: {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB; free some (or lower "
            "trainer.save_total_limit), then run the same command again: nothing is lost"
        )
