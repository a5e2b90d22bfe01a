"""Folders that cannot be used are found before the work, and a run directory that goes away is named as such."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from raylign.config import parse_config
from raylign.config.blocks import RunBlock, TrackingBlock
from raylign.errors import ConfigError, DiskError
from raylign.records import Preference, ReferenceLogps
from raylign.run.checkpoints import Metrics
from raylign.run.directory import RunDirectory, continue_or_create
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.mlflow_store import create_database
from raylign.tracking.tracker import Tracker
from raylign.tracking.uri import default_uri, sqlite_path
from recipes.run import recorded
from tests.fakes import CountingRank, Deadly, NoFeed
from tests.faults import record
from tests.unit.recipes.commands.test_cli import finished, raylign, recipe
from tests.unit.run.test_resume import config_in, files_up_to, run_once, tables, what_it_came_to, whole

__all__ = ["finished", "recipe", "whole"]


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.fault
@pytest.mark.parametrize("place", ["a link", "a dangling link", "below a file", "/proc", "the run", "a long name"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_place_that_cannot_be_exported_to_is_found_before_the_work(
    place: str, merge: bool, finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    to, message = {
        "a link": (tmp_path / "link", f"a link to {tmp_path / 'empty'}; give that folder itself"),
        "a dangling link": (tmp_path / "dangling", f"a link to {tmp_path / 'nowhere'}"),
        "below a file": (
            tmp_path / "file/sub/out",
            "cannot be written: Not a directory; make it writable, or set --to",
        ),
        "/proc": (Path("/proc/raylign/out"), "cannot be written: "),
        "the run": (finished.path / "checkpoints/0009", "inside the run directory"),
        "a long name": (tmp_path / ("x" * 250), "cannot be written: File name too long"),
    }[place]
    monkeypatch.setattr("recipes.commands.export.resolve_model", lambda *arguments: pytest.fail("the work has begun"))
    before = tree(tmp_path)
    result = raylign("export", finished.path, "--to", to, *(["--merge"] if merge else []))
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output
    assert tree(tmp_path) == before
    record("export to where nothing can be put", place, lost="nothing: refused before the work")


@pytest.mark.fault
@pytest.mark.parametrize("merge", [True, False])
def test_a_disk_without_room_is_found_before_the_work(
    merge: bool, finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylign.run.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr("raylign.export.policy.AutoModelForCausalLM", None)
    before = tree(tmp_path)
    result = raylign("export", finished.path, "--to", tmp_path / "out", *(["--merge"] if merge else []))
    assert result.exit_code == 1 and "0 MB free, the model needs 0 MB; free some, or give --to" in result.stderr
    assert tree(tmp_path) == before
    record("export to a full disk", "1,000 bytes free", lost="nothing: refused before the work")


@pytest.mark.fault
@pytest.mark.parametrize(("size", "merge"), [(0, False), (700, False), (3_000, False), (5_000, True)])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    size: int, merge: bool, finished: RunDirectory, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    with files_up_to(size):
        result = raylign("export", finished.path, "--to", tmp_path / "out", *(["--merge"] if merge else []))
    assert result.exit_code == 1 and "cannot be written: File too large; free some space" in result.stderr
    assert tree(tmp_path) == before
    record(
        "disk full during an export", f"no file may grow beyond {size:,} bytes", lost="nothing: said, no folder left"
    )


@pytest.mark.parametrize("name", ["a b", "a#b", "a=b", "a@b:c", "a&b", "ü", "-x", "a;b"])
def test_the_database_stands_beside_the_run_whatever_the_folder_is_called(name: str, tmp_path: Path) -> None:
    uri = default_uri(TrackingBlock(), tmp_path / name / "run")
    assert sqlite_path(uri) == tmp_path / name / "mlflow.db"


def test_the_database_of_an_odd_folder_is_made_there(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c=d@e:f&g;ü"
    create_database(default_uri(TrackingBlock(), folder / "run"))
    assert sorted(path.name for path in tmp_path.rglob("mlflow.db*")) == ["mlflow.db"]
    assert (folder / "mlflow.db").is_file()


@pytest.mark.fault
@pytest.mark.parametrize("name", ["a?b", "?", "a?mode=ro", "a%20b"])
def test_a_folder_that_would_put_the_database_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run.dir=.*: MLflow would take its database .* without '\?' and '%' in its path"
    ):
        default_uri(TrackingBlock(), tmp_path / name / "run")
    assert default_uri(TrackingBlock(uri="http://host:5000"), tmp_path / name / "run") == "http://host:5000"
    record("`?` or `%` in run.dir", f"run.dir=.../{name}", lost="nothing: refused; the database went elsewhere")


@pytest.mark.parametrize(
    "name", ["mlflow.db", "mlflow.db-wal", "mlartifacts", "x.quarantine.jsonl", "..", "a/b", "a\n"]
)
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run.name: "):
        parse_config({"run": {"name": name}})


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("~/runs", "nothing puts your home folder in the place of ~"),
        ("~someone/runs", "nothing puts your home folder in the place of ~"),
        ("a\0b", "has control characters"),
        ("a\nb", "has control characters"),
        ("x" * 256, "is longer than file systems take"),
        ("ü" * 128, "is longer than file systems take"),
        ("/".join(["x" * 200] * 20), "is longer than file systems take"),
    ],
)
def test_folders_that_cannot_be_are_refused(folder: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        RunBlock(dir=Path(folder))


class Moving(CountingRank):
    """Somebody moves the run directory away in the middle of the third step."""

    def train_step(self) -> Metrics:
        report = super().train_step()
        run = self._config.run.dir / self._config.run.name
        if len(self._reports) == 3 and run.exists():
            run.rename(run.with_name("moved"))
        return report


@pytest.mark.fault
def test_a_run_directory_that_is_moved_is_named_and_goes_on_once_it_is_back(
    whole: tuple[Deadly, RunDirectory], tmp_path: Path
) -> None:
    config = config_in(tmp_path)
    with pytest.raises(DiskError, match="online-dpo was moved or deleted while this run was at work in it") as error:
        run_once(config, tmp_path, rank=Moving)
    assert "move it back" in error.value.cure
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["moved"]
    (tmp_path / "runs/moved").rename(tmp_path / "runs/online-dpo")
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    assert what_it_came_to(directory) == what_it_came_to(whole[1]) and tables(directory.path) == tables(whole[1].path)
    record("the run directory moved while running", "renamed in a step", lost="nothing: named; moved back, it goes on")


class Deleting(CountingRank):
    """Somebody deletes the run directory while reference log-probs are computed."""

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, ReferenceLogps]:
        shutil.rmtree(self._config.run.dir)
        return super().reference_candidates(preferences, seed, rounds_done)


@pytest.mark.fault
def test_a_run_directory_that_is_deleted_is_named_and_not_begun_again_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="was moved or deleted while this run was at work in it"):
        run_once(config_in(tmp_path), tmp_path, rank=Deleting)
    assert not (tmp_path / "runs").exists()
    record("the run directory deleted while running", "rm -r", lost="what was in it: named, nothing grows in its place")


@contextmanager
def closing(directory: RunDirectory) -> Iterator[None]:
    with recorded(Tracker(Journal(directory.path / JOURNAL_NAME), NoFeed()), directory):
        yield


def test_errors_that_follow_from_a_moved_run_directory_are_told_as_that(tmp_path: Path) -> None:
    directory = continue_or_create(config_in(tmp_path))
    with pytest.raises(DiskError, match="was moved or deleted") as error, closing(directory):
        directory.path.rename(tmp_path / "moved")
        raise ConfigError("no such file")
    assert isinstance(error.value.__cause__, ConfigError)
    assert [event.payload for event in read_events(tmp_path / "moved" / JOURNAL_NAME)] == [{"status": "FAILED"}]
    (tmp_path / "moved").rename(directory.path)
    with pytest.raises(ConfigError, match="no such file"), closing(directory):
        raise ConfigError("no such file")
    replaced = directory.path.with_name("other")
    replaced.mkdir()
    os.rename(directory.path, tmp_path / "moved")
    os.rename(replaced, directory.path)
    assert not directory.is_in_place and RunDirectory(directory.path).is_in_place
