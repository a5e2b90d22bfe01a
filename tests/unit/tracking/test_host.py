"""The driver's host in the journal."""

from pathlib import Path

import psutil
import pytest

from raylign.tracking import host
from raylign.tracking.host import host_metrics, host_watched
from raylign.tracking.journal import Journal, read_events
from raylign.tracking.tracker import Tracker
from tests.fakes import NoFeed
from tests.mlflow_servers import wait_until


def systems(journal: Path) -> list[dict[str, float]]:
    return [event.payload["host"] for event in read_events(journal) if event.name == "system"]


def test_the_host_is_on_record_while_a_run_is_at_work_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "INTERVAL_S", 0.01)
    path = tmp_path / "events.jsonl"
    with Journal(path) as journal:
        with host_watched(Tracker(journal, NoFeed()), tmp_path):
            wait_until(lambda: len(systems(path)) >= 2)
        found = len(systems(path))
        journal.append("step", {})
    assert len(systems(path)) == found
    assert all(0 <= one["cpu_utilization_percentage"] <= 100 for one in systems(path))


def test_a_disk_that_is_gone_ends_the_watch_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "INTERVAL_S", 0.01)
    with Journal(tmp_path / "events.jsonl") as journal, host_watched(Tracker(journal, NoFeed()), tmp_path / "gone"):
        pass
    assert systems(tmp_path / "events.jsonl") == []


def test_the_numbers_are_psutils_under_mlflows_names(tmp_path: Path) -> None:
    found, memory = host_metrics(tmp_path), psutil.virtual_memory()
    assert found["system_memory_usage_megabytes"] == pytest.approx(memory.used / 1e6, rel=0.2)
    assert found["disk_available_megabytes"] == pytest.approx(psutil.disk_usage(str(tmp_path)).free / 1e6, rel=0.2)
