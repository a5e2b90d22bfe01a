"""Where MLflow's record stands."""

from pathlib import Path
from typing import TYPE_CHECKING

from raylign.config.blocks import TrackingBlock
from raylign.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


def default_uri(block: TrackingBlock, run_dir: Path) -> str:
    """The tracking URI to use: the block's, or sqlite beside the run directory. sqlite paths come back absolute.

    Raises ConfigError for folders (`file:` or a bare path), which MLflow no longer takes as a store, and where the
    place beside the run directory cannot be written as a URI.
    """
    if block.uri is None:
        return _beside(run_dir)
    if block.uri.startswith("sqlite:"):
        return _sqlite_url(block.uri).set(database=str(sqlite_path(block.uri))).render_as_string(hide_password=False)
    if block.uri != "databricks" and ("://" not in block.uri or block.uri.startswith("file:")):
        raise ConfigError(
            f"tracking.uri={block.uri!r} is not a server or database; give http(s)://..., sqlite:///... or leave it out"
        )
    return block.uri


def _beside(run_dir: Path) -> str:
    """MLflow would read a part of some paths as options, and make its database elsewhere."""
    path = run_dir.resolve().parent / "mlflow.db"
    uri = f"sqlite:///{path}"
    # Every other character stands for itself.
    if not {"?", "%"}.isdisjoint(str(path)) and ((url := _sqlite_url(uri)).database != str(path) or url.query):
        raise ConfigError(
            f"run.dir={run_dir.parent}: MLflow would take its database {path} for {url.database}; name a folder "
            "without '?' and '%' in its path (run.dir=...), or another database (tracking.uri=sqlite:////absolute/mlflow.db)"
        )
    return uri


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: `mlartifacts` beside a sqlite database; None leaves it to the server."""
    if not uri.startswith("sqlite:"):
        return None
    return (sqlite_path(uri).parent / "mlartifacts").as_uri()


def sqlite_path(uri: str) -> Path:
    """The absolute path of a sqlite URI's file. Raises ConfigError when it names none."""
    return Path(str(_sqlite_url(uri).database)).resolve()


def _sqlite_url(uri: str) -> "URL":
    # Takes a tenth of the time of a command that asks for no database.
    from sqlalchemy.engine import make_url  # noqa: PLC0415
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

    try:
        url = make_url(uri)
    except ArgumentError as error:
        raise ConfigError(f"tracking.uri={uri!r} is not a database URI; give sqlite:////absolute/mlflow.db") from error
    if not url.database or url.database == ":memory:":
        raise ConfigError(f"tracking.uri={uri!r} names no file; give sqlite:////absolute/mlflow.db")
    return url
