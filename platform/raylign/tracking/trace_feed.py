"""Sends tables as traces, a request at a time, so that the feed's other work never waits behind them."""

import logging
from collections.abc import Iterator
from pathlib import Path

from raylign.errors import RaylignError, RecordError, TrackingError
from raylign.run.files import inside
from raylign.tracking.feed import FeedState, TraceFile
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.trace_rows import Trace, read_traces

TRACES_PER_CALL = 32
"""Traces whose spans are sent in one request. A feed that is killed sends as many again at most."""
_TRIES = 5
"""Of one request, before it is set aside; and traces in a row, before that means an MLflow that takes none."""

logger = logging.getLogger(__name__)


class TraceFeed:
    """Works through `state.traces`: each trace with its feedback in one request, the spans of some in one more.

    A trace that MLflow fails at again and again, while it answers otherwise, is set aside (`state.aside`): the rest
    goes on, and the next process tries it once more. Where several in a row fail, MLflow takes no traces at present,
    which is waited out.
    """

    def __init__(self, store: MlflowStore, run_dir: Path, state: FeedState) -> None:
        self._store, self._run_dir, self._state = store, run_dir, state
        self._reader: Iterator[Trace] | None = None
        self._waiting: Trace | None = None
        self._sent: list[Trace] = []
        """Traces without their spans yet."""
        self._last_row = 0
        self._failures = self._aside_in_a_row = 0
        state.traces += state.aside
        state.aside.clear()

    def add(self, file: TraceFile) -> None:
        """Put `file` behind the others; one of the same path that is not done yet gives way to it."""
        kept = [other for other in self._state.traces if other.path != file.path]
        if self._state.traces and kept[:1] != self._state.traces[:1]:
            self._forget()
        self._state.traces[:] = [*kept, file]

    def drop(self) -> None:
        """Send none of what is pending."""
        self._state.traces.clear()
        self._state.aside.clear()
        self._forget()

    def step(self) -> bool:
        """Send one request, if anything is pending; whether the state has changed.

        Raises TrackingError when waiting may help: call it again then. What MLflow refuses or cannot be read is left
        out, and what it always fails at set aside, each with a warning.
        """
        if not self._state.traces:
            return False
        file = self._state.traces[0]
        if self._waiting is None and len(self._sent) < TRACES_PER_CALL:
            self._waiting = self._next(file)
        if self._waiting is not None:
            return self._start(file, self._waiting)
        return self._end(file)

    def _next(self, file: TraceFile) -> Trace | None:
        try:
            found = next(self._traces(file), None)
        except RecordError as error:
            logger.warning("%s; the rest of its traces is left out", error)
            self._reader = iter(())
            return None
        return None if found and file.until is not None and found.row >= file.until else found

    def _start(self, file: TraceFile, trace: Trace) -> bool:
        set_aside = False
        try:
            self._store.start_trace(trace.info)
            self._sent.append(trace)
            self._failures = self._aside_in_a_row = 0
        except TrackingError as error:
            if error.passing:
                self._require_its_own(error)
                self._set_aside(file, trace, error)
                set_aside = True
            else:
                logger.warning("MLflow does not take trace %s (%s)", trace.info.trace_id, error)
        self._last_row, self._waiting = trace.row, None
        return set_aside

    def _end(self, file: TraceFile) -> bool:
        """Send the spans of the traces so far: all of the file, or as many as go into a request."""
        last = len(self._sent) < TRACES_PER_CALL
        try:
            if self._sent:
                self._store.log_spans(self._state.experiment_id, [trace.span for trace in self._sent])
                self._failures = self._aside_in_a_row = 0
        except TrackingError as error:
            if error.passing:
                self._require_its_own(error)
                self._send_one_by_one(file)
            else:
                logger.warning("MLflow takes no traces of %s (%s)", file.path, error)
                last = True
        self._sent.clear()
        file.rows = self._last_row + 1
        if last:
            del self._state.traces[0]
            self._reader = None
        return True

    def _send_one_by_one(self, file: TraceFile) -> None:
        """The spans that MLflow fails at together: each that it takes, the others are set aside."""
        while self._sent:
            trace = self._sent[0]
            try:
                self._store.log_spans(self._state.experiment_id, [trace.span])
                self._aside_in_a_row = 0
            except TrackingError as error:
                if self._aside_in_a_row >= _TRIES:
                    raise
                self._set_aside(file, trace, error)
            del self._sent[0]

    def _require_its_own(self, error: TrackingError) -> None:
        """Raises TrackingError unless MLflow answers, and has failed at this request alone often enough."""
        self._failures += 1
        if self._failures < _TRIES or self._aside_in_a_row >= _TRIES:
            raise error
        self._store.has(self._state.run_id)

    def _set_aside(self, file: TraceFile, trace: Trace, error: TrackingError) -> None:
        self._failures, self._aside_in_a_row = 0, self._aside_in_a_row + 1
        own = file.model_copy(update={"rows": trace.row, "until": trace.row + 1})
        self._state.aside[:] = [other for other in self._state.aside if other != own] + [own]
        logger.warning("trace %s (%s) is set aside: MLflow fails at it (%s)", trace.info.trace_id, own.told, error)

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
        self._sent.clear()
