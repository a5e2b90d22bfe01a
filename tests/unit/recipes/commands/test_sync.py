"""What MLflow misses: said when a run ends, sent by `raylign sync`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from raylign.config import load_config
from raylign.run.directory import RunDirectory, create_run
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.commands.cli import app
from recipes.run import recorded
from tests.fakes import NoFeed
from tests.unit.tiny_policy import save_recipe


class Behind(NoFeed):
    """A feed whose MLflow is away."""

    def close(self, timeout_s: float) -> int:
        return 3


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = load_config(save_recipe(tmp_path))
    return create_run(config.run, config)


def sync(run: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["sync", str(run), *options])


def test_a_run_that_ends_with_events_missing_names_the_command(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded(Tracker(Journal(run.path / JOURNAL_NAME), Behind()), run):
        pass
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("MLflow misses 3 event(s)") and line.endswith(f"raylign sync {run.path}")
    assert [event.payload for event in read_events(run.path / JOURNAL_NAME)] == [{"status": "FINISHED"}]


def test_what_cannot_be_synced_is_explained(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, options, message in (
        (tmp_path, (), "is no run directory: it has no config.yaml"),
        (run.path, (), "no journal there"),
        (run.path, ("--uri", "mlruns"), "tracking.uri='mlruns' is not a server or database"),
        (run.path, ("--uri", "http://me:secret@host"), "credentials in the URI would be saved"),
    ):
        result = sync(folder, *options)
        assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
        assert "secret" not in result.stderr
    with Journal(run.path / JOURNAL_NAME) as journal:
        journal.append("campaign_finished", {"status": "FAILED"})
    result = sync(run.path, "--uri", f"sqlite:///{tmp_path}/file/sub/mlflow.db")
    assert result.exit_code == 1 and "cannot be made (Not a directory)" in result.stderr
