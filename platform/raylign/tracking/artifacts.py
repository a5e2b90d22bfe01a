"""Files of a run directory as MLflow artifacts and datasets."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from raylign.errors import RaylignError, RecordError
from raylign.reading.files import read_text
from raylign.reading.yaml_text import parse_yaml
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.pages import TABLE_SUFFIXES, row_count, table_page
from raylign.tracking.params import redacted

UPLOAD_LIMIT_MIB = 256
_MAX_DIGEST = 36

logger = logging.getLogger(__name__)


def inside(run_dir: Path, relative: str) -> Path:
    """`relative` as a path under `run_dir`, links followed. Raises RaylignError when it leads outside."""
    path = (run_dir / relative).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise RaylignError(f"artifact {relative!r} is outside the run directory {run_dir}; copy it into the run first")
    return path


def dataset_input(
    name: str, digest: str, source_type: str, source: Mapping[str, Any], profile: Mapping[str, int]
) -> DatasetInput:
    """A training data set as MLflow shows it; the digest is cut to MLflow's 36 characters, whole in a tag."""
    dataset = Dataset(
        name, digest[:_MAX_DIGEST], source_type, json.dumps(dict(source)), None, json.dumps(dict(profile))
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training"), InputTag("raylign.digest", digest)])


def upload(store: MlflowStore, run_id: str, run_dir: Path, payload: Mapping[str, Any]) -> bool:
    """Send the file of an artifact event, and a page of it if it is a table. False when the file is gone or damaged."""
    path = inside(run_dir, payload["path"])
    relative = PurePosixPath(payload["path"])
    if not path.is_file():
        logger.warning("%s is gone; MLflow goes without it", path)
        return False
    if payload["kind"] == "config":
        text = yaml.safe_dump(redacted(parse_yaml(read_text(path))), sort_keys=False)
        store.log_text(run_id, text, str(relative))
        return True
    if path.suffix in TABLE_SUFFIXES:
        try:
            # A lone surrogate in model output has no UTF-8 form.
            page = table_page(path).encode("utf-8", "replace").decode()
        except RecordError as error:
            logger.warning("%s; MLflow goes without it", error)
            return False
        store.log_text(run_id, page, str(relative.with_suffix(".html")))
    if path.stat().st_size > UPLOAD_LIMIT_MIB << 20:
        logger.info("%s is above %d MiB; MLflow gets its page only", path, UPLOAD_LIMIT_MIB)
        return True
    folder = str(relative.parent)
    store.log_file(run_id, path, None if folder == "." else folder)
    return True


def name_preferences(store: MlflowStore, run_id: str, run_dir: Path, payload: Mapping[str, Any]) -> None:
    """Name a round's preferences as the run's training data."""
    path = inside(run_dir, payload["path"])
    name = f"preferences-round-{payload['round']}"
    profile = {"num_rows": row_count(path)} if path.suffix in TABLE_SUFFIXES else {}
    store.log_dataset(run_id, dataset_input(name, payload["sha256"], "local", {"uri": str(path)}, profile))
