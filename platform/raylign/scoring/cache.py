"""Scores on disk, so that nothing is judged twice. One SQLite file, which processes may share."""

import hashlib
import json
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from raylign.chunks import chunks
from raylign.errors import ScorerError
from raylign.records import Prompt, Score
from raylign.report.text import one_line
from raylign.scoring.base import ItemScorer, ScoringItem
from raylign.scoring.usage import Usage

log = logging.getLogger(__name__)
CACHE_NAME = "scores.sqlite"
DAMAGED = ".damaged"
_BUSY_S = 60.0
_KEYS_PER_QUERY = 500
_TABLE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value REAL NOT NULL, parts TEXT NOT NULL)"
_REASONS = "CREATE TABLE IF NOT EXISTS reasons (key BLOB PRIMARY KEY, reason TEXT NOT NULL)"
"""A table of its own, for the few scorers that give some: files without it stay as they are."""
_SHOWN = 80
_VALUE = TypeAdapter(FiniteFloat, config=ConfigDict(strict=True))
_PARTS = TypeAdapter(dict[str, float], config=ConfigDict(strict=True))
_REASON = TypeAdapter(str, config=ConfigDict(strict=True))
T = TypeVar("T")
_UNASKED = Score(None, reason="not asked")


class ScoreCache:
    """Scores by key. A file that is damaged is set aside, with a warning, and another one is begun.

    Every call opens the file anew, so that processes and threads may share it. Not for folders that several machines
    write at once.
    """

    def __init__(self, path: Path) -> None:
        """Raises ScorerError when the file cannot be made or opened."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error
        self.get([b""])

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Score]:
        """The scores that are there."""
        return self._safely(lambda connection: _read(connection, keys))

    def put(self, scores: Mapping[bytes, Score]) -> None:
        """Keep scores, which all have a value; those that are there already stay."""
        rows = [(key, score.value, json.dumps(dict(score.parts))) for key, score in scores.items()]
        reasons = [(key, _storable(score.reason)) for key, score in scores.items() if score.reason]
        self._safely(lambda connection: _write(connection, rows, reasons))

    def _safely(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            try:
                return self._connected(work)
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                # The second where SQLite's own complaint quotes bytes that are no text.
                self._set_aside(error)
                return self._connected(work)
        except (sqlite3.OperationalError, OSError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ScorerError:
        return ScorerError(
            f"the scores in {self._path} cannot be read or written ({error}); free the disk, name another file in "
            "the scorer's cache option, or set that to null"
        )

    def _connected(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_S)) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_TABLE)
            connection.execute(_REASONS)
            return work(connection)

    def _set_aside(self, error: Exception) -> None:
        aside = self._path.with_name(f"{self._path.name}{DAMAGED}")
        log.warning("%s is damaged (%s) and set aside as %s; its scores are asked for again", self._path, error, aside)
        os.replace(self._path, aside)
        for ending in ("-wal", "-shm"):
            self._path.with_name(f"{self._path.name}{ending}").unlink(missing_ok=True)


def _read(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Score]:
    found: dict[bytes, Score] = {}
    for some in chunks(keys, _KEYS_PER_QUERY):
        query = (
            "SELECT scores.key, value, parts, reason FROM scores LEFT JOIN reasons ON reasons.key = scores.key "
            f"WHERE scores.key IN ({', '.join('?' * len(some))})"
        )
        found |= {key: _kept_score(*row) for key, *row in connection.execute(query, some)}
    return found


def _kept_score(value: object, parts: Any, reason: object) -> Score:
    """A row as `put` writes it. Raises sqlite3.DatabaseError for what it never writes."""
    try:
        told = "" if reason is None else _REASON.validate_python(reason)
        return Score(_VALUE.validate_python(value), _PARTS.validate_json(parts), told)
    except ValidationError as error:
        raise sqlite3.DataError(f"a score is kept as {one_line(repr((value, parts, reason)), _SHOWN)}") from error


def _write(
    connection: sqlite3.Connection,
    rows: Iterable[tuple[bytes, float | None, str]],
    reasons: Iterable[tuple[bytes, str]],
) -> None:
    connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)
    connection.executemany("INSERT OR IGNORE INTO reasons VALUES (?, ?)", reasons)


def _storable(text: str) -> str:
    """Half a surrogate pair has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()


class CachedScorer:
    """Asks `scorer` only about what `cache` does not have; keeps what is scored, never what is not.

    A key is the sha256 of the scorer's identity, the prompt's messages, the completion and what else the score
    depends on. For scorers of single candidates; of one that compares them, verdicts are kept (`Verdicts`).
    """

    def __init__(
        self,
        scorer: ItemScorer,
        cache: ScoreCache,
        identity: str,
        usage: Usage,
        *,
        context: Callable[[ScoringItem], object],
    ) -> None:
        self._scorer, self._cache, self._identity, self._usage = scorer, cache, identity, usage
        self._context = context

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order; items from the cache count as scored."""
        keys = [self._key(item) for item in items]
        known = self._cache.get(keys)
        asked = [place for place, key in enumerate(keys) if key not in known]
        scores = [known.get(key, _UNASKED) for key in keys]
        for place, score in zip(asked, self._ask([items[place] for place in asked], allowed), strict=True):
            scores[place] = score
        kept = {keys[place]: scores[place] for place in asked if _can_be_kept(scores[place])}
        if kept:
            self._cache.put(kept)
        self._usage.cache_hits += len(items) - len(asked)
        return scores

    def _ask(self, items: Sequence[ScoringItem], allowed: int | None) -> list[Score]:
        return self._scorer.score(items, allowed) if items else []

    def _key(self, item: ScoringItem) -> bytes:
        messages = [dict(message) for message in item.prompt.messages]
        return score_key(self._identity, messages, item.completion, self._context(item))


def score_key(*facts: object) -> bytes:
    """sha256 of what decides a score."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).digest()


def _can_be_kept(score: Score) -> bool:
    return score.value is not None and math.isfinite(score.value)


Texts = tuple[str, ...]
"""What one question is about: an answer to rate, or two to compare, the one that is called A first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer as a number: a rating, or the share of the win that goes to the first.

    `reason` is empty where the judge gives none.
    """

    value: float
    reason: str = ""


class Verdicts:
    """The verdicts of one judge."""

    def __init__(self, cache: ScoreCache | None, identity: str) -> None:
        """Without a `cache` nothing is kept. `identity` is the judge's (`raylign.scoring.load`)."""
        self._cache, self._identity = cache, identity

    def key(self, prompt: Prompt, texts: Texts) -> bytes:
        """Of a question."""
        return score_key(self._identity, [dict(message) for message in prompt.messages], texts)

    def known(self, keys: Sequence[bytes]) -> dict[bytes, Verdict]:
        """Those of `keys` that were answered before."""
        found = {} if self._cache is None else self._cache.get(keys)
        return {key: Verdict(score.value, score.reason) for key, score in found.items() if score.value is not None}

    def keep(self, answered: Mapping[bytes, Verdict]) -> None:
        if self._cache is not None and answered:
            self._cache.put({key: Score(own.value, reason=own.reason) for key, own in answered.items()})
