"""The thread that follows a journal into MLflow. An outage delays it; nothing waits for it.

What it remembers between processes is in `mlflow.json` of the run directory.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, TypeAdapter
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_when_event_set, wait_exponential

from raylign.boundary.imports import uncollected
from raylign.boundary.secrets import without_credentials, without_secrets
from raylign.config.blocks import TrackingBlock
from raylign.config.scoring import ScoringBlock
from raylign.errors import TrackingError
from raylign.run.files import read_record
from raylign.tracking.journal import JOURNAL_NAME, read_events

if TYPE_CHECKING:
    from raylign.tracking.writer import MlflowWriter

STATE_NAME = "mlflow.json"


class ScoreSource(BaseModel):
    """Who gives a score or a part of one."""

    judge: bool = False
    """Whether it is a language model that is asked."""
    title: str = "scorer"


class Tracing(BaseModel):
    """What becomes traces, as the journal has it."""

    preferences: float = Field(ge=0, le=1)
    """Share of a round's preferences."""
    scorers: dict[str, ScoreSource] = Field(default_factory=dict)
    """By the name of the part, the whole under the empty name."""


def tracing(block: TrackingBlock, scorers: Mapping[str, ScoringBlock]) -> Tracing | None:
    """What `block` asks for, of a run with these scorers by part."""
    if not block.traces:
        return None
    sources = {
        part: ScoreSource(judge=scorer.is_judge, title=without_secrets(scorer.title))
        for part, scorer in scorers.items()
    }
    return Tracing(preferences=block.traced_preferences, scorers=sources)


class TraceFile(BaseModel):
    """A table whose rows become traces. The first `rows` of it are done."""

    kind: str
    """`samples` or `preferences`, as in the journal."""
    path: str
    """Within the run directory."""
    round: int
    time_ms: int
    rows: int = Field(0, ge=0)
    until: int | None = None
    """The row before which it ends; None is the end of the table."""

    @property
    def told(self) -> str:
        """Which row waits next."""
        return f"row {self.rows} of {self.path}"


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
    tracing: Tracing | None = None
    """None makes no traces."""
    traces: list[TraceFile] = Field(default_factory=list)
    """What is not wholly there as traces yet, though its event is."""
    aside: list[TraceFile] = Field(default_factory=list)
    """Traces that MLflow has failed at so often that the rest goes on without them: the next process tries again."""

    @property
    def without_traces(self) -> int:
        """Events whose table is not wholly there as traces."""
        return len({file.path for file in (*self.traces, *self.aside)})

    @property
    def sent(self) -> int:
        """Events of which MLflow has everything."""
        return self.sequence - self.without_traces


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


_WRITER = "raylign.tracking.writer"
_POLL_S = 2.0
"""Steps that come within it are sent in one call."""
_LONGEST_WAIT_S = 60.0
_WAIT_WHILE_CLOSING_S = 1.0
_TRACES_SHARE = 0.0025
"""Of a core, at most, goes into traces while the run is in progress; what is left is sent when it closes."""

logger = logging.getLogger(__name__)


def load_ahead() -> None:
    """Load MLflow, which takes seconds, beside what comes next; a feed that needs it meanwhile waits for it."""
    threading.Thread(target=_load_writer, name="mlflow-loading", daemon=True).start()


def _load_writer() -> None:
    with uncollected():
        import_module(_WRITER)


class MlflowFeed:
    """Follows `events.jsonl` of a run directory from where `mlflow.json` says it stopped.

    Starting it again, in any process and after any crash, sends what is missing and nothing twice.
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        """Start following. Raises RaylignError when the state file is not readable."""
        self._run_dir = run_dir.resolve()
        self._journal = self._run_dir / JOURNAL_NAME
        self._uri = uri
        self._experiment = experiment
        self._draining = threading.Event()
        self._stopped = threading.Event()
        self._failures: list[BaseException] = []
        load_state(self._run_dir, uri)
        self._thread = threading.Thread(target=self._run, name="mlflow-feed", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> int:
        """Wait at most `timeout_s` for MLflow to hold every event; returns how many are missing.

        An event is missing too where traces of its file are. Whatever MLflow did or answered, they are missing and no
        more. Raises what else stopped the feed.
        """
        self._draining.set()
        self._thread.join(timeout_s)
        self._stopped.set()
        state = load_state(self._run_dir, self._uri)
        missing = state.without_traces + sum(1 for _ in read_events(self._journal, after=state.sequence))
        if self._failures:
            raise self._failures[0]
        return missing

    def _run(self) -> None:
        try:
            self._follow()
        except TrackingError as refusal:
            if not self._stopped.is_set():
                logger.warning("MLflow at %s takes no more of this run (%s)", without_credentials(self._uri), refusal)
        except BaseException as error:  # a thread has no caller: `close` raises it
            if not self._stopped.is_set():
                self._failures.append(error)
                logger.error("MLflow feed stopped by %s: %s", type(error).__name__, error)

    def _follow(self) -> None:
        # MLflow takes seconds to load, which nobody waits for here.
        from raylign.tracking.writer import MlflowWriter, may_pass, send, send_traces  # noqa: PLC0415

        if self._stopped.is_set():
            return
        retrying = Retrying(
            retry=retry_if_exception(may_pass),
            wait=wait_exponential(multiplier=1, max=_LONGEST_WAIT_S),
            stop=stop_when_event_set(self._stopped),
            sleep=self._pause,
            before_sleep=self._warn,
            reraise=True,
        )
        writer = retrying(MlflowWriter.connect, self._uri, self._experiment, self._run_dir, self._stopped)
        offset, waits = 0, _TraceWaits()
        while not self._stopped.is_set():
            last_pass = self._draining.is_set()
            for _, end in send(writer, retrying, self._journal, offset):
                offset = end
                if self._stopped.is_set():
                    return
            if last_pass:
                send_traces(writer, retrying)
                return
            self._trace_for(_POLL_S, writer, waits)

    def _trace_for(self, seconds: float, writer: "MlflowWriter", waits: "_TraceWaits") -> None:
        """Send traces for so long, within their share of a core, and wait out the rest."""
        until = time.monotonic() + seconds
        while not self._draining.is_set() and (now := time.monotonic()) < until:
            if now < waits.until:
                self._draining.wait(min(until, waits.until) - now)
            elif not waits.send(writer):
                self._draining.wait(until - now)

    def _pause(self, seconds: float) -> None:
        if self._draining.is_set():
            self._stopped.wait(min(seconds, _WAIT_WHILE_CLOSING_S))
        else:
            self._draining.wait(seconds)

    def _warn(self, attempt: RetryCallState) -> None:
        if attempt.attempt_number == 1 and attempt.outcome is not None:
            reason = attempt.outcome.exception()
            logger.warning("MLflow at %s fails (%s); the run goes on", without_credentials(self._uri), reason)


class _TraceWaits:
    """When the next request for a trace may be made."""

    def __init__(self) -> None:
        self.until = 0.0
        self._failures = 0

    def send(self, writer: "MlflowWriter") -> bool:
        """Make one; False when no trace waits. What fails is tried again later, while metrics go on."""
        began = time.thread_time()
        try:
            sent = writer.send_trace()
            self._failures, pause = 0, (time.thread_time() - began) / _TRACES_SHARE
        except TrackingError as error:
            if not error.passing:
                raise
            sent, pause = True, min(2.0**self._failures, _LONGEST_WAIT_S)
            self._failures += 1
        self.until = time.monotonic() + pause
        return sent
