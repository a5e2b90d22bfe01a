"""Journal events to MLflow in order, and what counts as an outage."""

from collections.abc import Iterator
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError
from tenacity import Retrying

from raylign.text import escape_control
from raylign.tracking.journal import Event, read_from
from raylign.tracking.params import without_credentials
from raylign.tracking.writer import MlflowWriter

_REFUSED = "INVALID_PARAMETER_VALUE"
MLFLOW_ERRORS = (MlflowException, requests.RequestException, OperationalError)
"""What a store that is away, or that refuses a request, raises."""


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


def is_outage(error: BaseException) -> bool:
    """Whether waiting can help; a request that MLflow calls invalid stays invalid."""
    if isinstance(error, MlflowException):
        return bool(error.error_code != _REFUSED)
    return isinstance(error, MLFLOW_ERRORS)


def brief(error: BaseException | None) -> str:
    """The first line of an error, without credentials and terminal controls, 300 characters at most."""
    return escape_control(without_credentials(str(error).split("\n", 1)[0])[:300])
