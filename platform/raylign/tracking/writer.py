"""Turns journal events into MLflow calls. Every call can be repeated without adding anything twice."""

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from pydantic import Field, TypeAdapter
from tenacity import Retrying

from raylign.chunks import chunks
from raylign.config.blocks import TrackingBlock
from raylign.errors import TrackingError
from raylign.report.measures import capability_chart, chart_name
from raylign.tracking.artifacts import dataset_input, preferences_input, upload
from raylign.tracking.feed import FeedState, RoundState, TraceFile, Tracing, load_state, save_state, tracing
from raylign.tracking.journal import Event, read_from
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.presented import AT_FIRST, present, round_note, tags_of
from raylign.tracking.trace_feed import TraceFeed

METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_LONGEST_UNSAVED_S = 10.0
_FIGURES_SHARE = 100
_TRACED = frozenset({"samples", "preferences"})
_MAX_PARAM = 6000
_MAX_TAG = 8000
_MAX_NAME = 250
_TEXT = TypeAdapter(str)
_TEXTS = TypeAdapter(dict[str, str])
_NAMES = TypeAdapter(list[str])
_INDEX = TypeAdapter(Annotated[int, Field(ge=0, lt=10**12)])
_TIME = TypeAdapter(Annotated[float, Field(ge=0, lt=10**12)])
_VALUE = TypeAdapter(float | None)
_VALUES: TypeAdapter[Mapping[str, float | None]] = TypeAdapter(dict[str, float | None])
_COUNTS: TypeAdapter[Mapping[str, int]] = TypeAdapter(dict[str, int])
_TRACING: TypeAdapter[Tracing | None] = TypeAdapter(Tracing | None)
_ANY: TypeAdapter[Mapping[str, Any]] = TypeAdapter(dict[str, Any])
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")

# One line per table of a new database otherwise.
for _name in ("mlflow.store.db", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class MlflowWriter:
    """Applies events in order. Metrics wait in memory until `flush`, which also saves the position."""

    def __init__(self, store: MlflowStore, run_dir: Path, uri: str, state: FeedState) -> None:
        self._store = store
        self._run_dir = run_dir
        self._uri = uri
        self._metrics: list[tuple[str, Metric]] = []
        self._saved = state.sequence
        self._flushed = time.monotonic()
        self._page: str | None = None
        """The run's status that its page must still tell; None when nothing has changed."""
        self._measured = self._finished = False
        """Whether there is something that no figure shows yet, and whether a round or a comparison is finished."""
        self._next_figures = 0.0
        self._traces = TraceFeed(store, run_dir, state)
        self.state = state

    @classmethod
    def connect(cls, uri: str, experiment: str, run_dir: Path, closed: threading.Event | None = None) -> Self:
        """Open the store, create the experiment if missing, and start again if our run is gone from it."""
        store = MlflowStore(uri, closed)
        state = load_state(run_dir, uri)
        if not (state.run_id and store.has(state.run_id)):
            state = FeedState(experiment_id=store.experiment(experiment))
        return cls(store, run_dir, uri, state)

    @property
    def due(self) -> bool:
        """Whether to flush now: enough metrics wait, or a slow store has kept the position unsaved for long."""
        return len(self._metrics) >= METRICS_PER_CALL or time.monotonic() - self._flushed > _LONGEST_UNSAVED_S

    def apply(self, event: Event) -> None:
        """Do what one event asks. After an error, apply the same event again."""
        match event.name:
            case "campaign_started":
                self._run_started(event)
            case "prompts":
                self._prompts(event)
            case "evaluation":
                measured = {**_evaluated(event), **_capability(event)}
                self._log(self._parent(event), event, event.get("round", _INDEX), measured)
                self._page, self._measured = "RUNNING", True
            case "round_started":
                self._round_started(event)
            case "stage":
                self._stage(event)
            case "step":
                self._step(event)
            case "round_finished":
                self._round_finished(event)
            case "incident":
                self._incident(event)
            case "guard":
                told: list[str] = event.get("decisions", _NAMES)
                tag = RunTag(f"guard.round_{event.get('round', _INDEX)}", "; ".join(told)[:_MAX_TAG])
                self._store.log_tags(self._parent(event), [tag])
            case "artifact":
                self._artifact(event)
            case "system":
                self._log(self._parent(event), event, event.sequence, _prefixed("system", event.get("host", _VALUES)))
            case "campaign_finished":
                self._run_finished(event)
            case _:
                error = event.wrong("is unknown here")
                error.cure = "use the raylign that wrote it, or newer"
                raise error
        self.state.sequence = event.sequence

    def flush(self) -> None:
        """Send the waiting metrics, renew the run's page, then save the position."""
        for run_id in dict.fromkeys(run_id for run_id, _ in self._metrics):
            metrics = [metric for owner, metric in self._metrics if owner == run_id]
            for chunk in chunks(metrics, METRICS_PER_CALL):
                self._store.log_metrics(run_id, chunk)
        self._metrics.clear()
        if self._page is not None:
            self._present(self._page)
        if self.state.sequence != self._saved:
            self._save()
        self._flushed = time.monotonic()

    def _present(self, status: str) -> None:
        """The page's text at once; its figures when there are new ones and a hundred times what they cost has passed.

        So they take 1 % of one core at most, however short rounds are; the end of a run has them in any case. The start
        of one has none: the text shows none before the first round is finished.
        """
        due = self._finished and time.monotonic() >= self._next_figures
        draw = self._measured and (status != "RUNNING" or due)
        began = time.thread_time()
        present(self._store, self.state.run_id, self._run_dir, status, draw=draw)
        if draw:
            self._measured = False
            self._next_figures = time.monotonic() + _FIGURES_SHARE * (time.thread_time() - began)
        self._page = None

    def send_trace(self) -> bool:
        """One request of the traces that wait; False when none does. Call it after `flush`, again after an error."""
        if not self.state.traces:
            return False
        if self._traces.step():
            self._save()
        return True

    def _save(self) -> None:
        save_state(self._run_dir, self._uri, self.state)
        self._saved = self.state.sequence

    def _parent(self, event: Event) -> str:
        if not self.state.run_id:
            raise event.wrong("comes before campaign_started")
        return self.state.run_id

    def _round(self, event: Event) -> RoundState:
        index = event.get("round", _INDEX)
        if index not in self.state.rounds:
            raise event.wrong(f"comes before round_started {index}")
        return self.state.rounds[index]

    def _run_started(self, event: Event) -> None:
        campaign, name = event.get("campaign", _TEXT), event.get("name", _TEXT)
        facts, params = event.get("tags", _TEXTS), event.get("params", _TEXTS)
        identity = {"raylign.campaign": campaign, "raylign.kind": "campaign"}
        run_id = self.state.run_id or self._find_or_create(identity, AT_FIRST, name, event)
        self._store.set_running(run_id)
        tags = {**tags_of(params, facts), "raylign.run_dir": str(self._run_dir)}
        self._log_params(run_id, params, tags)
        self._page = "RUNNING"
        self.state.tracing = (
            event.get("traces", _TRACING) if "traces" in event.payload else tracing(TrackingBlock(), {})
        )
        if self.state.tracing is None:
            self._traces.drop()
        self.state.campaign, self.state.name = campaign, name
        self.state.run_id = run_id

    def _log_params(self, run_id: str, wanted: Mapping[str, str], tags: dict[str, str]) -> None:
        """Params cannot change in MLflow: what a resumed run changed becomes a `changed.*` tag."""
        params = {_safe_name(key): value[:_MAX_PARAM] for key, value in wanted.items()}
        logged = self._store.params(run_id)
        new = [Param(key, value) for key, value in params.items() if key not in logged]
        changed = {f"changed.{key}": value for key, value in params.items() if logged.get(key, value) != value}
        for chunk in chunks(new, _PARAMS_PER_CALL):
            self._store.log_params(run_id, chunk)
        entries = [RunTag(_safe_name(key), value[:_MAX_TAG]) for key, value in {**tags, **changed}.items()]
        for tag_chunk in chunks(entries, _PARAMS_PER_CALL):
            self._store.log_tags(run_id, tag_chunk)

    def _prompts(self, event: Event) -> None:
        digest, source_type = event.get("digest", _TEXT), event.get("source_type", _TEXT)
        prompts = dataset_input("prompts", digest, source_type, event.get("source", _ANY), event.get("counts", _COUNTS))
        self._store.log_dataset(self._parent(event), prompts)

    def _round_started(self, event: Event) -> None:
        """Every attempt at a round has the same run; one that has finished stays so."""
        index, parent = event.get("round", _INDEX), {MLFLOW_PARENT_RUN_ID: self._parent(event)}
        if index not in self.state.rounds:
            identity = {
                "raylign.campaign": self.state.campaign,
                "raylign.kind": "round",
                "raylign.round": str(index),
            }
            tags = {MLFLOW_RUN_NOTE: round_note(index, self.state.name), **parent}
            run_id = self._find_or_create(identity, tags, f"{self.state.name}-round-{index}", event)
            self.state.rounds[index] = RoundState(run_id=run_id)
        round_state = self.state.rounds[index]
        if round_state.status != "FINISHED":
            self._store.set_running(round_state.run_id)
            round_state.status = "RUNNING"

    def _stage(self, event: Event) -> None:
        name, seconds = event.get("name", _TEXT), event.get("seconds", _VALUE)
        round_state = self._round(event)
        if name not in round_state.stages:
            self._log(round_state.run_id, event, event.get("round", _INDEX), {f"run/seconds/{name}": seconds})
            round_state.stages.append(name)

    def _step(self, event: Event) -> None:
        round_state, step = self._round(event), event.get("step", _INDEX)
        if step <= round_state.steps:
            return
        measured: Mapping[str, float | None] = event.get("metrics", _VALUES)
        metrics = dict(measured)
        if "non_finite" in event.payload:
            metrics["non_finite"] = len(event.get("non_finite", _NAMES))
        self._log(round_state.run_id, event, step, metrics)
        round_state.steps = step

    def _round_finished(self, event: Event) -> None:
        round_state, index = self._round(event), event.get("round", _INDEX)
        if round_state.status == "FINISHED":
            return
        measured = {
            **_evaluated(event),
            **_capability(event),
            **_prefixed("run/counts", event.get("counts", _VALUES)),
            **_prefixed("run/sync", event.get("sync", _VALUES)),
            **_prefixed("run/scoring", event.get("scoring", _VALUES) if "scoring" in event.payload else {}),
            "run/policy_version": event.get("policy_version", _INDEX),
        }
        train: Mapping[str, float | None] = event.get("train", _VALUES)
        of_parent = {**measured, **_prefixed("run/seconds", event.get("seconds", _VALUES)), **train}
        note = round_note(index, self.state.name, event.get("evaluation", _VALUES))
        self._store.log_tags(round_state.run_id, [RunTag(MLFLOW_RUN_NOTE, note)])
        self._store.set_ended(round_state.run_id, "FINISHED", _milliseconds(event.time))
        round_state.status = "FINISHED"
        self._log(round_state.run_id, event, index, {_single(name): value for name, value in measured.items()})
        self._log(self._parent(event), event, index, of_parent)
        self._page, self._measured, self._finished = "RUNNING", True, True

    def _incident(self, event: Event) -> None:
        """How many actors of a role were lost or recovered so far, over the round in which it happened."""
        name = f"run/incidents/{event.get('role', _TEXT)}_{event.get('happened', _TEXT)}"
        self._log(self._parent(event), event, event.get("round", _INDEX), {name: event.get("count", _INDEX)})

    def _artifact(self, event: Event) -> None:
        index, kind, relative = event.get("round", _INDEX), event.get("kind", _TEXT), event.get("path", _TEXT)
        round_state = self.state.rounds.get(index)
        run_id = self._parent(event) if round_state is None else round_state.run_id
        sent = upload(self._store, run_id, self._run_dir, relative, kind)
        if sent and self.state.tracing and kind in _TRACED and relative.endswith(".parquet"):
            time_ms = _milliseconds(event.time)
            self._traces.add(TraceFile(kind=kind, path=relative, round=index, time_ms=time_ms))
        if kind == "report":
            self._page, self._measured, self._finished = "RUNNING", True, True
        if sent and kind == "preferences" and round_state and not round_state.has_preferences:
            dataset = preferences_input(self._run_dir, relative, index, event.get("sha256", _TEXT))
            self._store.log_dataset(round_state.run_id, dataset)
            round_state.has_preferences = True

    def _run_finished(self, event: Event) -> None:
        ended = event.get("ended", _TIME) if "ended" in event.payload else event.time
        status, end = event.get("status", _TEXT), _milliseconds(ended)
        for round_state in self.state.rounds.values():
            if round_state.status == "RUNNING":
                self._store.set_ended(round_state.run_id, status, end)
                round_state.status = status
        self._store.set_ended(self._parent(event), status, end)
        self._page = status

    def _find_or_create(self, identity: dict[str, str], tags: Mapping[str, str], name: str, event: Event) -> str:
        """The run that has `identity` as tags; a run made just before a crash is found again."""
        experiment, start = self.state.experiment_id, _milliseconds(event.time)
        found = self._store.find_run(experiment, identity)
        return found or self._store.create_run(experiment, start, {**tags, **identity}, name)

    def _log(self, run_id: str, event: Event, step: int, values: Mapping[str, float | None]) -> None:
        timestamp = _milliseconds(event.time)
        self._metrics += [
            (run_id, Metric(_safe_name(key), float(value), timestamp, step))
            for key, value in values.items()
            if value is not None
        ]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _evaluated(event: Event) -> dict[str, float | None]:
    return {chart_name(name): value for name, value in event.get("evaluation", _VALUES).items()}


def _prefixed(prefix: str, values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {f"{prefix}/{key}": value for key, value in values.items()}


def _single(name: str) -> str:
    """Of a round's own run, whose charts begin with the curves of its steps: one value is no curve."""
    return name if name.startswith("run/") else f"run/{name}"


def _capability(event: Event) -> dict[str, float | None]:
    """Journals of earlier versions have none."""
    found = event.get("capability", _VALUES) if "capability" in event.payload else {}
    return {capability_chart(name, found): value for name, value in found.items()}


def _safe_name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:_MAX_NAME]


def send(writer: MlflowWriter, retrying: Retrying, journal: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Give `writer` what it misses of the whole events from byte `offset` on.

    Yields every event, with the offset of the next, once it is applied; metrics are sent many at a time, the last ones
    at the end.
    """
    for event, end in read_from(journal, offset):
        if event.sequence > writer.state.sequence:
            retrying(writer.apply, event)
        if writer.due:
            retrying(writer.flush)
        yield event, end
    retrying(writer.flush)


def send_traces(writer: MlflowWriter, retrying: Retrying) -> None:
    """All traces that wait, after `send`."""
    while retrying(writer.send_trace):
        pass


def may_pass(error: BaseException) -> bool:
    """Whether waiting can help; a request that MLflow calls invalid stays invalid."""
    return isinstance(error, TrackingError) and error.passing
