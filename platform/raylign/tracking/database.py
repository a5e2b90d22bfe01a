"""MLflow's sqlite database, made whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from mlflow.tracking import MlflowClient

from raylign.errors import ConfigError
from raylign.tracking.uri import sqlite_path


def create_database(uri: str) -> None:
    """Create the database of a sqlite URI if it is missing; other URIs are left alone.

    MLflow builds its tables in many steps: two runs doing so in one file, or a crash between steps, break it for good.
    So they are built in a private file, which then takes its place at once. Raises ConfigError when its folder cannot
    be made.
    """
    if not uri.startswith("sqlite:"):
        return
    path = sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}, the folder of MLflow's database, cannot be made ({error.strerror}); name another one in "
            "tracking.uri"
        ) from error
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        with tempfile.TemporaryDirectory(prefix="raylign-mlflow-") as folder:
            private = Path(folder) / path.name
            MlflowClient(tracking_uri=f"sqlite:///{private}")
            _put(private, path)


def _put(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(target)
