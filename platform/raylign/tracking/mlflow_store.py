"""MLflow's sqlite database, made whole or not at all."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from mlflow.entities import DatasetInput, LifecycleStage, Metric, Param, RunTag, Span, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from raylign.boundary.secrets import without_secrets
from raylign.errors import ConfigError, RaylignError, TrackingError
from raylign.report.text import escape_control
from raylign.tracking.transport import limited
from raylign.tracking.uri import artifact_location, sqlite_path


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


_REFUSED = "INVALID_PARAMETER_VALUE"
_UNKNOWN = "RESOURCE_DOES_NOT_EXIST"
_SHOWN = 300
_LONGEST_ID = 256
# MLflow opens an experiment without a kind on its pages for agents, not on the runs and their curves.
_TRAINING = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Runs of raylign: each is a parent run with the curves of its rounds, and a nested run for "
    "each round with those of its steps. If this page shows traces and no runs, choose Model training at its top. "
    "Filter by tags: `tags.verdict = 'better'`, and recipe, model, loss, scorer and status in the same way.",
}
T = TypeVar("T")


class MlflowStore:
    """A server or database. Every method raises TrackingError, whose `passing` says whether waiting may help."""

    def __init__(self, uri: str, closed: threading.Event | None = None) -> None:
        """Creates the database of a sqlite URI. Raises ConfigError when its folder cannot be made."""
        self._uri = uri
        _asked(lambda: create_database(uri))
        self._closed = closed
        self._client: MlflowClient = _asked(lambda: MlflowClient(tracking_uri=uri))
        self._tracing: TracingClient = _asked(lambda: TracingClient(uri))

    def experiment(self, name: str) -> str:
        """The id of the experiment called `name`, which is made if it is missing."""
        found = self._ask(lambda: self._client.get_experiment_by_name(name))
        if found is None:
            where = artifact_location(self._uri)
            try:
                return _id(self._ask(lambda: self._client.create_experiment(name, where, tags=_TRAINING)), "experiment")
            except TrackingError as error:
                # Another process may have made it meanwhile.
                found = self._ask(lambda: self._client.get_experiment_by_name(name))
                if found is None:
                    raise error
        if self._ask(lambda: found.lifecycle_stage) != LifecycleStage.ACTIVE:
            raise _refusal(
                f"tracking.experiment={name!r} is deleted in MLflow; restore it there or choose another name"
            )
        return _id(self._ask(lambda: found.experiment_id), "experiment")

    def has(self, run_id: str) -> bool:
        """Whether the run is there and not deleted."""
        try:
            return bool(self._ask(lambda: self._client.get_run(run_id).info.lifecycle_stage) == LifecycleStage.ACTIVE)
        except TrackingError as error:
            if isinstance(error.__cause__, MlflowException) and error.__cause__.error_code == _UNKNOWN:
                return False
            raise

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        """A run with all of `tags`."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._ask(
            lambda: [run.info.run_id for run in self._client.search_runs([experiment_id], condition, max_results=1)]
        )
        return _id(found[0], "run") if found else None

    def create_run(self, experiment_id: str, start_ms: int, tags: dict[str, str], name: str) -> str:
        """The id of a new run."""
        return _id(
            self._ask(lambda: self._client.create_run(experiment_id, start_ms, tags, name).info.run_id),
            "run",
        )

    def params(self, run_id: str) -> dict[str, str]:
        """What was logged before."""
        return self._ask(lambda: dict(self._client.get_run(run_id).data.params))

    def set_running(self, run_id: str) -> None:
        self._ask(lambda: self._client.update_run(run_id, status="RUNNING"))

    def set_ended(self, run_id: str, status: str, end_ms: int) -> None:
        self._ask(lambda: self._client.set_terminated(run_id, status, end_ms))

    def log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        self._ask(lambda: self._client.log_batch(run_id, metrics=metrics, synchronous=True))

    def log_params(self, run_id: str, params: Sequence[Param]) -> None:
        self._ask(lambda: self._client.log_batch(run_id, params=params, synchronous=True))

    def log_tags(self, run_id: str, tags: Sequence[RunTag]) -> None:
        self._ask(lambda: self._client.log_batch(run_id, tags=tags, synchronous=True))

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        self._ask(lambda: self._client.log_inputs(run_id, [dataset]))

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """`text` as the artifact called `name`."""
        self._ask(lambda: self._client.log_text(run_id, text, name))

    def log_file(self, run_id: str, file: Path, folder: str | None) -> None:
        """The file as an artifact of its own name in `folder`."""
        self._ask(lambda: self._client.log_artifact(run_id, str(file), folder))

    def start_trace(self, info: TraceInfo) -> None:
        """The trace with its feedback; one that is there gets these values, and keeps what others have added."""
        self._ask(lambda: self._tracing.start_trace(info))

    def log_spans(self, experiment_id: str, spans: Sequence[Span]) -> None:
        """Spans of traces, in one request; those that are there are replaced."""
        self._ask(lambda: self._tracing.log_spans(experiment_id, list(spans)))

    def _ask(self, ask: Callable[[], T]) -> T:
        """Nothing more once `closed` is set: by then another process may tell MLflow how the run has ended."""
        if self._closed is not None and self._closed.is_set():
            raise TrackingError("the feed of this run is closed")
        return _asked(ask)


def _asked(ask: Callable[[], T]) -> T:
    """What `ask` gives. Raises TrackingError for whatever MLflow and its libraries make of an answer."""
    try:
        with limited():
            return ask()
    except RaylignError:
        raise
    except NotImplementedError as error:
        raise _refusal(shown(str(error))) from error
    except MlflowException as error:
        failure = TrackingError(shown(str(error)))
        failure.passing = error.error_code != _REFUSED
        raise failure from error
    except Exception as error:
        raise TrackingError(shown(f"{type(error).__name__}: {error}")) from error


def _refusal(message: str) -> TrackingError:
    refusal = TrackingError(message)
    refusal.passing = False
    return refusal


def _id(value: Any, of: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _LONGEST_ID:
        raise TrackingError(f"answered {shown(repr(value))} as the id of the {of}")
    return value


def shown(text: str) -> str:
    """The first line, without secrets and terminal controls, 300 characters at most."""
    return escape_control(without_secrets(text[: 10 * _SHOWN].split("\n", 1)[0])[:_SHOWN])
