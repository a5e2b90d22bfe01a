"""Journals with one damaged line, sent to MLflow by a writer whose store takes everything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hypothesis import strategies as st
from mlflow.entities import Metric

from raylign.tracking.feed import FeedState
from raylign.tracking.journal import JOURNAL_NAME, read_events
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.writer import MlflowWriter
from tests.fuzz.mutations import as_json, changed
from tests.fuzz.records import finished_run

INCIDENT = {"event": "incident", "round": 1, "role": "trainer", "happened": "lost", "count": 1}
ENDED = {"event": "campaign_finished", "status": "FINISHED", "ended": 1795912439.0}


class _Store:
    """Answers as MLflow does; what it is given has the types that MLflow takes."""

    def find_run(self, experiment_id: str, tags: dict[str, str]) -> None:
        assert all(type(tag) is str for tag in tags.values())

    def create_run(self, experiment_id: str, start_ms: int, tags: dict[str, str], name: str) -> str:
        assert type(start_ms) is int and type(name) is str
        return "r"

    def params(self, run_id: str) -> dict[str, str]:
        return {}

    def log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        assert all(type(one.value) is float and type(one.step) is int for one in metrics)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def events() -> list[dict[str, Any]]:
    """Of a finished run, with an incident."""
    lines = (finished_run() / JOURNAL_NAME).read_bytes().splitlines()
    found = [json.loads(line) for line in lines] + [{"time": 1795912439.0, **INCIDENT}, {"time": 1795912440.0, **ENDED}]
    return [event | {"sequence": number} for number, event in enumerate(found, start=1)]


def written(found: list[Any]) -> bytes:
    return b"".join(as_json(event) + b"\n" for event in found)


def inputs() -> st.SearchStrategy[bytes]:
    whole = events()

    def damage(number: int) -> st.SearchStrategy[bytes]:
        return changed([whole[number]]).map(lambda event: written([*whole[:number], event, *whole[number + 1 :]]))

    return st.sampled_from(range(len(whole))).flatmap(damage)


def reader(folder: Callable[[], Path]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        path = folder() / "journal" / JOURNAL_NAME
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        writer = MlflowWriter(cast(MlflowStore, _Store()), path.parent, "sqlite:///x", FeedState(experiment_id="1"))
        for event in read_events(path):
            writer.apply(event)
        writer.flush()
        (path.parent / "mlflow.json").unlink(missing_ok=True)

    return read
