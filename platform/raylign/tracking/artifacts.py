"""Files of a run directory as MLflow artifacts and datasets."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from raylign.errors import RecordError
from raylign.reading.files import read_text
from raylign.reading.yaml_text import parse_yaml
from raylign.report.text import one_line
from raylign.run.files import inside
from raylign.run.reading import unreadable
from raylign.tracking.facts import redacted
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.pages import TABLE_SUFFIXES, row_count, table_page

UPLOAD_LIMIT_MIB = 256
_MAX_DIGEST = 36
_SHOWN = 200
_CURE = "restore it from a copy"

logger = logging.getLogger(__name__)


def dataset_input(
    name: str, digest: str, source_type: str, source: Mapping[str, Any], profile: Mapping[str, int]
) -> DatasetInput:
    """A training data set as MLflow shows it; the digest is cut to MLflow's 36 characters, whole in a tag."""
    dataset = Dataset(
        name, digest[:_MAX_DIGEST], source_type, json.dumps(dict(source)), None, json.dumps(dict(profile))
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training"), InputTag("raylign.digest", digest)])


def upload(store: MlflowStore, run_id: str, run_dir: Path, name: str, kind: str) -> bool:
    """Send the file `name` of the run, and a page of it if it is a table. False when the file is gone or damaged."""
    path, relative = inside(run_dir, name), PurePosixPath(name)
    if not path.is_file():
        logger.warning("%s is gone; MLflow goes without it", path)
        return False
    try:
        if kind == "config":
            store.log_text(run_id, _config_text(path), name)
            return True
        if path.suffix in TABLE_SUFFIXES:
            # A lone surrogate in model output has no UTF-8 form.
            page = table_page(path).encode("utf-8", "replace").decode()
            store.log_text(run_id, page, str(relative.with_suffix(".html")))
    except RecordError as error:
        logger.warning("%s; MLflow goes without it", error)
        return False
    if path.stat().st_size > UPLOAD_LIMIT_MIB << 20:
        logger.info("%s is above %d MiB; MLflow gets its page only", path, UPLOAD_LIMIT_MIB)
        return True
    folder = str(relative.parent)
    store.log_file(run_id, path, None if folder == "." else folder)
    return True


def preferences_input(run_dir: Path, name: str, index: int, sha256: str) -> DatasetInput:
    """The preferences of round `index` as its training data."""
    path = inside(run_dir, name)
    profile = {"num_rows": row_count(path)} if path.suffix in TABLE_SUFFIXES else {}
    return dataset_input(f"preferences-round-{index}", sha256, "local", {"uri": str(path)}, profile)


def _config_text(path: Path) -> str:
    """A recipe without secrets. Raises RecordError."""
    try:
        tree = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(path, one_line(str(error), _SHOWN), _CURE) from error
    if not isinstance(tree, dict):
        raise unreadable(path, "it is no mapping", _CURE)
    return yaml.safe_dump(redacted(tree), sort_keys=False)
