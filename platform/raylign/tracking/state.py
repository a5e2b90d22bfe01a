"""What MLflow feeds remember between processes: `mlflow.json` in the run directory."""

import os
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter

from raylign.boundary.secrets import without_credentials
from raylign.run.files import read_record

STATE_NAME = "mlflow.json"


class RoundState(BaseModel):
    """A round's run in MLflow, the same for every attempt at the round, and which of its events MLflow has."""

    run_id: str
    status: str = "RUNNING"
    """As MLflow has it; FINISHED stays."""
    steps: int = 0
    """The last optimizer step taken; earlier ones that come again are of a repeated attempt."""
    stages: list[str] = Field(default_factory=list)
    has_preferences: bool = False


class FeedState(BaseModel):
    """Position in the journal and MLflow's ids. `sequence` is the last event that MLflow surely holds."""

    sequence: int = 0
    experiment_id: str = ""
    campaign: str = ""
    """The run's own id, from the journal."""
    name: str = ""
    run_id: str = ""
    """The parent run in MLflow."""
    rounds: dict[int, RoundState] = Field(default_factory=dict)


class _Stores(BaseModel):
    """By tracking URI, without credentials: ids of one store mean nothing in another."""

    stores: dict[str, FeedState] = Field(default_factory=dict)


_STORES = TypeAdapter(_Stores)


def load_state(run_dir: Path, uri: str) -> FeedState:
    """The state kept for `uri`, or a fresh one that starts at the first event."""
    return _load(run_dir).stores.get(without_credentials(uri), FeedState())


def save_state(run_dir: Path, uri: str, state: FeedState) -> None:
    """Replace the state file in one step."""
    stores = _Stores(stores={**_load(run_dir).stores, without_credentials(uri): state})
    temporary = run_dir / f".{STATE_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(stores.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_dir / STATE_NAME)


def _load(run_dir: Path) -> _Stores:
    path = run_dir / STATE_NAME
    if not path.exists():
        return _Stores()
    return read_record(path, _STORES, "delete it, the journal is then sent again without duplicates")
