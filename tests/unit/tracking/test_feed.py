"""A feed that is closed asks MLflow for nothing more, whatever it was at: another process may go on in its place."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raylign.tracking.feed import MlflowFeed
from raylign.tracking.journal import JOURNAL_NAME, Journal
from raylign.tracking.mlflow_store import MlflowStore
from tests.mlflow_servers import put_database

STARTED = {"campaign": "c", "name": "run", "params": {}, "tags": {}}


def test_what_a_closed_feed_was_at_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was about to mark the run as running, long after somebody else may have marked its end."""
    asked, go_on = threading.Event(), threading.Event()
    find_run = MlflowStore.find_run

    def slowly(self: MlflowStore, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        found = find_run(self, experiment_id, tags)
        asked.set()
        assert go_on.wait(300)
        return found

    monkeypatch.setattr(MlflowStore, "find_run", slowly)
    with Journal(tmp_path / JOURNAL_NAME) as journal:
        journal.append("campaign_started", STARTED)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    feed = MlflowFeed(tmp_path, uri, "raylign")
    assert asked.wait(300)
    assert feed.close(0.01) == 1
    go_on.set()
    feed._thread.join(300)
    assert not feed._thread.is_alive()
    monkeypatch.undo()
    store = MlflowStore(uri)
    assert store.find_run(store.experiment("raylign"), {"raylign.kind": "campaign"}) is None


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put_database(tmp_path / "mlflow.db")
    first, second = MlflowStore(uri), MlflowStore(uri)
    create = MlflowClient.create_experiment
    made: list[str] = []

    def later(self: MlflowClient, *arguments: object, **options: object) -> str:
        if not made:
            made.append("")
            made[0] = first.experiment("raylign")
        return create(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "create_experiment", later)
    assert second.experiment("raylign") == made[0] != ""
