"""What the MLflow feed remembers between processes: `mlflow.json` in the run directory."""

import os
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from raylign.errors import RaylignError
from raylign.tracking.params import without_credentials

STATE_NAME = "mlflow.json"
CAMPAIGN = "campaign"


class FeedState(BaseModel):
    """Position in the journal and MLflow's ids. `sequence` is the last event that MLflow surely holds."""

    uri: str
    """Tracking URI without credentials; ids of another server mean nothing here."""
    sequence: int = 0
    experiment_id: str = ""
    campaign: str = ""
    """The campaign's own id, from the journal."""
    name: str = ""
    runs: dict[str, str] = Field(default_factory=dict)
    """MLflow run ids: `campaign`, and `round-3` for the latest attempt at round 3."""
    open_rounds: list[str] = Field(default_factory=list)
    """Names in `runs` whose MLflow run has no final status yet."""


def load_state(run_dir: Path, uri: str) -> FeedState:
    """The state kept for `uri`, or a fresh one that starts at the first event."""
    path = run_dir / STATE_NAME
    fresh = FeedState(uri=without_credentials(uri))
    if not path.exists():
        return fresh
    try:
        state = FeedState.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RaylignError(
            f"{path}: not a feed state; delete it, the journal is then sent again without duplicates"
        ) from error
    return state if state.uri == fresh.uri else fresh


def save_state(run_dir: Path, state: FeedState) -> None:
    """Replace the state file in one step."""
    temporary = run_dir / f".{STATE_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(state.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_dir / STATE_NAME)
