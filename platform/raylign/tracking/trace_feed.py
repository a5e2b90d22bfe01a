"""Sends tables as traces, a request at a time, so that the feed's other work never waits behind them."""

import logging
from collections.abc import Iterator
from pathlib import Path

from mlflow.entities import Span

from raylign.errors import RaylignError, RecordError, TrackingError
from raylign.run.files import inside
from raylign.tracking.feed import FeedState, TraceFile
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.trace_rows import Trace, read_traces

TRACES_PER_CALL = 32
"""Traces whose spans are sent in one request. A feed that is killed sends as many again at most."""

logger = logging.getLogger(__name__)


class TraceFeed:
    """Works through `state.traces`: each trace with its feedback in one request, the spans of some in one more."""

    def __init__(self, store: MlflowStore, run_dir: Path, state: FeedState) -> None:
        self._store, self._run_dir, self._state = store, run_dir, state
        self._reader: Iterator[Trace] | None = None
        self._waiting: Trace | None = None
        self._spans: list[Span] = []
        self._last_row = 0

    def add(self, file: TraceFile) -> None:
        """Put `file` behind the others; one of the same path that is not done yet gives way to it."""
        kept = [other for other in self._state.traces if other.path != file.path]
        if self._state.traces and kept[:1] != self._state.traces[:1]:
            self._forget()
        self._state.traces[:] = [*kept, file]

    def drop(self) -> None:
        """Send none of what is pending."""
        self._state.traces.clear()
        self._forget()

    def step(self) -> bool:
        """Send one request, if anything is pending; whether the state has changed.

        Raises TrackingError when waiting may help: call it again then. What MLflow refuses or cannot be read is left
        out, with a warning.
        """
        if not self._state.traces:
            return False
        file = self._state.traces[0]
        if self._waiting is None and len(self._spans) < TRACES_PER_CALL:
            self._waiting = self._next(file)
        if self._waiting is not None:
            self._start(self._waiting)
            return False
        return self._end(file)

    def _next(self, file: TraceFile) -> Trace | None:
        try:
            return next(self._traces(file), None)
        except RecordError as error:
            logger.warning("%s; the rest of its traces is left out", error)
            self._reader = iter(())
            return None

    def _start(self, trace: Trace) -> None:
        try:
            self._store.start_trace(trace.info)
            self._spans.append(trace.span)
        except TrackingError as error:
            if error.passing:
                raise
            logger.warning("MLflow does not take trace %s (%s)", trace.info.trace_id, error)
        self._last_row, self._waiting = trace.row, None

    def _end(self, file: TraceFile) -> bool:
        """Send the spans of the traces so far: all of the file, or as many as go into a request."""
        last = len(self._spans) < TRACES_PER_CALL
        try:
            if self._spans:
                self._store.log_spans(self._state.experiment_id, self._spans)
        except TrackingError as error:
            if error.passing:
                raise
            logger.warning("MLflow takes no traces of %s (%s)", file.path, error)
            last = True
        self._spans.clear()
        file.rows = self._last_row + 1
        if last:
            del self._state.traces[0]
            self._reader = None
        return True

    def _traces(self, file: TraceFile) -> Iterator[Trace]:
        if self._reader is None:
            try:
                path = inside(self._run_dir, file.path)
            except RaylignError as error:
                raise RecordError(str(error)) from error
            self._reader = read_traces(path, file, self._state)
        return self._reader

    def _forget(self) -> None:
        self._reader, self._waiting = None, None
        self._spans.clear()
