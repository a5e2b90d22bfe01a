"""The one way in which errors reach the user: what happened, the cure, and the file that has the rest."""

import logging
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from actors.supervision.cures import cure_of
from raylign.boundary.secrets import without_secrets
from raylign.config.blocks import RunBlock
from raylign.errors import RaylignError, UnexpectedError, Waiting
from raylign.report.text import escape_control

WAITING = 3
"""Status of a command that ends because a run waits for answers of people; the same command goes on."""

log = logging.getLogger(__name__)
_LIBRARIES = ("ray", "vllm", "deepspeed", "torch")
_WAITED = ("GetTimeoutError",)
"""Errors of theirs that say no more than ours on top of them."""
_REST = "rest"
"""Attribute of an error: the file it was written to; of our own errors a field."""
_SHOWN = 300
_GO_ON = "what is finished is saved, the same command goes on with it; if it ends so again, report it with that file"


@contextmanager
def told(run: RunBlock) -> Iterator[None]:
    """Errors inside leave everything that is known of them in the run directory, or beside where it would be."""
    try:
        yield
    except Exception as error:
        folder = (run.dir / run.name).absolute()
        keep(error, folder / "error" if folder.is_dir() else folder.with_name(f"{folder.name}-error"))
        raise


def keep(error: Exception, place: Path) -> Path | None:
    """Write what is known of an error that other libraries stand behind, once, to a file named `place`-TIME.txt.

    None where there is no more to know than the error's own message.
    """
    kept: Path | None = getattr(error, _REST, None)
    if kept is None and (not isinstance(error, RaylignError) or any(_is_foreign(part) for part in _chain(error))):
        kept = _written(error, place)
        setattr(error, _REST, kept)
    return kept


def explained(error: Exception) -> RaylignError:
    """The error as the user gets it."""
    known = error if isinstance(error, RaylignError) else _unexpected(error)
    known.rest = keep(error, Path(tempfile.gettempdir()) / "raylign-error")
    return known


def _unexpected(error: Exception) -> UnexpectedError:
    named = _named(error)
    known = UnexpectedError(named)
    known.cure = cure_of("cluster", named, otherwise=_GO_ON) if _is_foreign(error) else _GO_ON
    return known


def _named(error: Exception) -> str:
    """`Type: message` in one line; without a message where it was raised."""
    told = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    told = told or (f"in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}" if frames else "")
    return f"{type(error).__name__}: {told if len(told) <= _SHOWN else f'{told[: _SHOWN - 3]}...'}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    part: BaseException | None = error
    while part is not None:
        yield part
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)


def _is_foreign(error: BaseException) -> bool:
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in _LIBRARIES]
    return bool(kinds) and type(error).__name__ not in _WAITED


def _written(error: BaseException, place: Path) -> Path | None:
    """The file with traceback, causes and notes; None where nothing can be written."""
    text = "".join(traceback.format_exception(error))
    safe = escape_control(without_secrets(text), keep="\n\t")
    name = f"{place.name}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
    folders = [place.parent, Path(tempfile.gettempdir())]
    for folder in folders if place.parent.is_dir() else folders[1:]:
        path = folder / name
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
                file.write(safe)
        except OSError as failure:
            log.warning("%s cannot be written (%s)", path, failure.strerror)
            continue
        return path
    return None


def say(error: Exception) -> int:
    """Print what happened, and on a second line the cure and where the rest is. The value is the status to end with."""
    if isinstance(error, Waiting):
        complain(str(error))
        return WAITING
    known = explained(error)
    complain(f"error: {known}")
    rest = f"the rest is in {known.rest}" if known.rest else ""
    if second := "; ".join(part for part in (known.cure and f"cure: {known.cure}", rest) if part):
        complain(second)
    return 1


def complain(message: str) -> None:
    """To stderr, in text that can neither steer the terminal nor show secrets."""
    text = escape_control(without_secrets(message), keep="\n")
    Console(stderr=True).print(Text(text), soft_wrap=True)


@contextmanager
def as_script() -> Iterator[None]:
    """For recipes started as scripts: errors are told as the command tells them, and end it with its status."""
    try:
        yield
    except Exception as error:
        raise SystemExit(say(error)) from error
