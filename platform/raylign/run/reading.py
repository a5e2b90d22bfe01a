"""The one door to what a run has written: a record is read whole and typed, or it is said to be unreadable."""

import logging
import os
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from raylign.errors import RecordError
from raylign.report.text import escape_control

log = logging.getLogger(__name__)
T = TypeVar("T")
_SHOWN = 60
GO_ON = "`raylign resume RUN` does again what it stands for"


def read_record(path: Path, kind: TypeAdapter[T], cure: str = "restore it from a copy") -> T:
    """The JSON file `path` as `kind`, whose types are taken strictly; fields that `kind` does not have are passed over.

    Raises RecordError with `cure`, naming the first thing that is wrong.
    """
    try:
        if not path.is_file():
            raise unreadable(path, "there is no such file" if not path.exists() else "it is no file", cure)
        return kind.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), cure) from error
    except ValidationError as error:
        raise unreadable(path, first_problem(error), cure) from error


def finished_record(path: Path, kind: TypeAdapter[T]) -> T | None:
    """The record of something that is finished; None where it is not: there is none, or it cannot be read any more.

    What cannot be read is said, once.
    """
    if not os.path.lexists(path):
        return None
    try:
        return read_record(path, kind, GO_ON)
    except RecordError as error:
        say_once(f"{error}, so it counts as not finished; {error.cure}")
        return None


def unreadable(path: Path, problem: str, cure: str) -> RecordError:
    """For a file of a run that is not what a run writes."""
    error = RecordError(f"{path} cannot be read: {problem}")
    error.cure = cure
    return error


def first_problem(error: ValidationError) -> str:
    """`steps.0.loss: Input should be a valid number (got 'x')` of the first of them."""
    detail = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] in ("json_invalid", "missing"):
        got = ""
    else:
        text = repr(detail["input"])
        got = f" (got {text if len(text) <= _SHOWN else f'{text[: _SHOWN - 3]}...'})"
    return escape_control(f"{f'{place}: ' if place else ''}{detail['msg']}{got}")


@cache
def say_once(message: str) -> None:
    """Warn; not again in this process."""
    log.warning(message)
