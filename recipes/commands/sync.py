"""Send MLflow what it misses of a run, from the run's journal."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from raylign.boundary.secrets import without_credentials
from raylign.errors import RaylignError, TrackingError
from raylign.report.console import stage_progress
from raylign.run.directory import open_run
from raylign.tracking import REQUEST_TIMEOUT
from raylign.tracking.feed import load_state
from raylign.tracking.journal import JOURNAL_NAME, Event, Journal, read_events
from raylign.tracking.uri import default_uri
from raylign.tracking.writer import MlflowWriter, may_pass, send, send_traces

_LONGEST_WAIT_S = 5.0
_TEXT = TypeAdapter(str)
_IN_PROGRESS = "it sends its events itself; run this again when it has ended"


@dataclass(frozen=True, slots=True)
class Synced:
    """`sent` of the `total` events of a run's journal were new to MLflow at `uri`; `status` is the run's there.

    `aside` traces are not there: MLflow fails at each of them again and again.
    """

    sent: int
    total: int
    uri: str
    status: str
    aside: int = 0


def sync_run(run: Path, uri: str | None, timeout_s: float, console: Console) -> Synced:
    """Send MLflow at `uri` (None: the run's own) what it misses of run directory `run`, each event once.

    A run whose driver was killed gets the status KILLED. Raises RaylignError when the run is in progress, when MLflow
    has failed for `timeout_s`, and when it refuses an event.
    """
    directory = open_run(run)
    tracking = directory.config(() if uri is None else (f"tracking.uri={uri}",)).tracking
    store = default_uri(tracking, directory.path)
    with directory.locked(_IN_PROGRESS):
        _close_journal(directory.path / JOURNAL_NAME)
        return _send(directory.path, store, tracking.experiment, timeout_s, console)


def _send(run_dir: Path, uri: str, experiment: str, timeout_s: float, console: Console) -> Synced:
    shown, journal = without_credentials(uri), run_dir / JOURNAL_NAME
    retrying = _retrying(shown, timeout_s, console)
    events = list(read_events(journal))
    try:
        with _requests_within(timeout_s):
            writer = retrying(MlflowWriter.connect, uri, experiment, run_dir)
            before, applied = writer.state.sent, writer.state.sequence
            with stage_progress(console, "sync", len(events) - applied, "events") as advance:
                for event, _ in send(writer, retrying, journal):
                    advance(int(event.sequence > applied))
            send_traces(writer, retrying)
        for file in writer.state.aside:
            line = f"set aside is the trace of {file.told}: MLflow fails at it; run this again to try once more"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    except TrackingError as error:
        missing = len(events) - load_state(run_dir, uri).sent
        problem = f"failed for {timeout_s:g} s" if may_pass(error) else "refuses an event"
        raise RaylignError(
            f"MLflow at {shown} {problem} ({error}); it misses {missing} of {len(events)} events, all safe in "
            f"{journal}. Put it right and run this again, or send them elsewhere with --uri"
        ) from error
    after = writer.state
    return Synced(after.sent - before, len(events), shown, _status(events), len(after.aside))


def _close_journal(journal: Path) -> None:
    """Put on record, as of its last event, the end of a run whose driver died without a word."""
    events = list(read_events(journal))
    if _status(events) == "RUNNING":
        with Journal(journal) as opened:
            opened.append("campaign_finished", {"status": "KILLED", "ended": events[-1].time})


def _status(events: list[Event]) -> str:
    ends = [event for event in events if event.name in ("campaign_started", "campaign_finished")]
    if not ends:
        return "not started"
    return "RUNNING" if ends[-1].name == "campaign_started" else ends[-1].get("status", _TEXT)


def _retrying(shown: str, timeout_s: float, console: Console) -> Retrying:
    def waiting(attempt: RetryCallState) -> None:
        if attempt.attempt_number == 1 and attempt.outcome is not None:
            line = f"MLflow at {shown} fails ({attempt.outcome.exception()}); trying for {timeout_s:g} s"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(multiplier=1, max=min(_LONGEST_WAIT_S, timeout_s)),
        stop=stop_after_delay(timeout_s),
        before_sleep=waiting,
        reraise=True,
    )


@contextmanager
def _requests_within(timeout_s: float) -> Iterator[None]:
    """No request takes longer than `timeout_s` or, if shorter, MLflow's own limit."""
    before = os.environ[REQUEST_TIMEOUT]
    os.environ[REQUEST_TIMEOUT] = str(min(int(before), math.ceil(timeout_s)))
    try:
        yield
    finally:
        os.environ[REQUEST_TIMEOUT] = before
