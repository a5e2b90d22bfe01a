"""Journal events to MLflow in order."""

from collections.abc import Iterator
from pathlib import Path

from tenacity import Retrying

from raylign.errors import TrackingError
from raylign.tracking.journal import Event, read_from
from raylign.tracking.writer import MlflowWriter


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


def may_pass(error: BaseException) -> bool:
    """Whether waiting can help; a request that MLflow calls invalid stays invalid."""
    return isinstance(error, TrackingError) and error.passing
