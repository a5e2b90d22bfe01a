"""Candidates, scores and preferences as Parquet: what a round saw and chose, for people and for later rounds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from raylign.records import Candidate, FinishReason, KlSample, Message, Preference, Prompt, Score
from raylign.run.files import publish_file, unreadable

_CANDIDATES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("messages", pa.string()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("score_parts", pa.string()),
        ("score_reason", pa.string()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("seed", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("part_reasons", pa.string()),
    ]
)
_PREFERENCES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("weights", pa.list_(pa.float64())),
        ("reference_logps", pa.list_(pa.float64())),
        ("indices", pa.list_(pa.int32())),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("kl_prompt_token_ids", pa.list_(pa.int32())),
        ("kl_token_ids", pa.list_(pa.int32())),
        ("kl_sampler_logp", pa.float64()),
        ("kl_reference_logp", pa.float64()),
        ("reference_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("old_logprobs", pa.list_(pa.list_(pa.float32()))),
    ]
)

_BY_TOKEN = ("reference_logprobs", "old_logprobs")
_MAY_BE_ABSENT = frozenset(
    {"kl_prompt_token_ids", "kl_token_ids", "kl_sampler_logp", "kl_reference_logp", *_BY_TOKEN, "part_reasons"}
)
"""Columns that earlier versions did not write."""
_NULLABLE = _MAY_BE_ABSENT | {"score"}
_MESSAGES = TypeAdapter(list[dict[str, Any]])
_CURE = "restore it from a copy; or remove stages.json beside it, and what it stands for is done again"


def write_candidates(
    path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
) -> None:
    """One row per candidate with its score; a null score is unscored. `messages` is the prompt as JSON.

    `score_reason` says why there is no score, or is the scorer's reason for it; `part_reasons` is null without any.
    """
    messages = {prompt.id: _json(prompt.messages) for prompt in prompts}
    rows = [
        {
            "prompt_id": candidate.prompt_id,
            "index": candidate.index,
            "messages": messages[candidate.prompt_id],
            "text": _storable(candidate.text),
            "score": score.value,
            "score_parts": _json(dict(score.parts)),
            "score_reason": _storable(score.reason),
            "finish_reason": candidate.finish_reason,
            "policy_version": candidate.policy_version,
            "seed": candidate.seed,
            "token_ids": candidate.token_ids,
            "logprobs": candidate.logprobs,
            "part_reasons": _json(dict(score.part_reasons)) if score.part_reasons else None,
        }
        for candidate, score in zip(candidates, scores, strict=True)
    ]
    _write(path, rows, _CANDIDATES)


def read_candidates(path: Path) -> tuple[list[Candidate], list[Score]]:
    """What `write_candidates` wrote, in its order; texts have replacements where UTF-8 could not hold them.

    Raises RecordError when it is not such a table.
    """
    candidates, scores = [], []
    for number, row in enumerate(_rows(path, _CANDIDATES)):
        with _row(path, number):
            if row["finish_reason"] not in get_args(FinishReason):
                raise ValueError(f"finish_reason is {row['finish_reason']!r}")
            candidates.append(
                Candidate(
                    prompt_id=row["prompt_id"],
                    index=row["index"],
                    token_ids=tuple(row["token_ids"]),
                    logprobs=tuple(row["logprobs"]),
                    text=row["text"],
                    finish_reason=row["finish_reason"],
                    policy_version=row["policy_version"],
                    seed=row["seed"],
                )
            )
            reasons = _part_reasons(row.get("part_reasons"))
            scores.append(Score(row["score"], _parts(row["score_parts"]), row["score_reason"], reasons))
    return candidates, scores


def read_outcomes(path: Path) -> Iterator[tuple[str, float | None]]:
    """The prompt's id and the score of each candidate that `write_candidates` wrote. Raises RecordError."""
    names = ("prompt_id", "score")
    wanted = pa.schema([_CANDIDATES.field(name) for name in names])
    return ((row["prompt_id"], row["score"]) for row in _rows(path, wanted))


def read_messages(path: Path) -> dict[str, Sequence[Message]]:
    """The conversation of each prompt of a table that `write_candidates` wrote, by the prompt's id.

    Raises RecordError when it is not such a table.
    """
    names = ("prompt_id", "messages")
    found: dict[str, Sequence[Message]] = {}
    for number, row in enumerate(_rows(path, pa.schema([_CANDIDATES.field(name) for name in names]))):
        if row["prompt_id"] not in found:
            with _row(path, number):
                found[row["prompt_id"]] = [*_MESSAGES.validate_json(row["messages"])]
    return found


def read_preferences(path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> tuple[Preference, ...]:
    """What `write_preferences` wrote of these prompts and candidates.

    Raises RecordError when it is not such a table, or of other prompts or candidates.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    by_place = {(candidate.prompt_id, candidate.index): candidate for candidate in candidates}
    found = []
    for number, row in enumerate(_rows(path, _PREFERENCES)):
        with _row(path, number):
            prompt = by_id[row["prompt_id"]]
            own = tuple(by_place[row["prompt_id"], index] for index in row["indices"])
            tokens = [prompt.token_ids, *(candidate.token_ids for candidate in own)]
            if [tuple(ids) for ids in (row["prompt_token_ids"], *row["token_ids"])] != tokens:
                raise ValueError(f"prompt {prompt.id} or an answer to it has other tokens now")
            scores, weights, logps = (tuple(row[name]) for name in ("scores", "weights", "reference_logps"))
            by_token = (_by_token(row, name, own) for name in _BY_TOKEN)
            found.append(Preference(prompt, own, scores, weights, logps, _kl_sample(row), *by_token))
    return tuple(found)


def write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    """One row per preference, candidates best..worst; `chosen` and `rejected` are the texts of the ends.

    The columns `kl_*` and those of log-probs by token are null where the loss does not ask for them.
    """
    rows = [
        {
            "prompt_id": preference.prompt.id,
            "messages": _json(preference.prompt.messages),
            "chosen": _storable(preference.candidates[0].text),
            "rejected": _storable(preference.candidates[-1].text),
            "scores": preference.scores,
            "weights": preference.weights,
            "reference_logps": preference.reference_logps,
            "indices": [candidate.index for candidate in preference.candidates],
            "prompt_token_ids": preference.prompt.token_ids,
            "token_ids": [candidate.token_ids for candidate in preference.candidates],
        }
        | {name: getattr(preference, name) or None for name in _BY_TOKEN}
        | (
            {f"kl_{name}": value for name, value in asdict(preference.kl_sample).items()}
            if preference.kl_sample
            else {}
        )
        for preference in preferences
    ]
    _write(path, rows, _PREFERENCES)


def _by_token(row: Mapping[str, Any], name: str, candidates: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
    """Log-probs by candidate and token; empty where there are none."""
    found = tuple(tuple(values) for values in row.get(name) or ())
    if found and [len(values) for values in found] != [len(candidate.token_ids) for candidate in candidates]:
        raise ValueError(f"{name} has another number of values than the answers have tokens")
    return found


def _kl_sample(row: Mapping[str, Any]) -> KlSample | None:
    if row.get("kl_token_ids") is None:
        return None
    prompt, tokens = tuple(row["kl_prompt_token_ids"] or ()), tuple(row["kl_token_ids"])
    if row["kl_sampler_logp"] is None:
        raise ValueError("kl_token_ids has no kl_sampler_logp")
    return KlSample(prompt, tokens, row["kl_sampler_logp"], row["kl_reference_logp"])


def _rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Every row, with the columns of `schema`. Raises RecordError; columns that may be absent then have nulls."""
    try:
        if not path.is_file():
            raise unreadable(path, "there is no such file", _CURE)
        # As a data set, pyarrow would take parts of the path for columns (`seed=1/`).
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in schema.names if names.count(name) > 1]:
                raise unreadable(path, f"it has {twice[0]!r} twice", _CURE)
            table = file.read(columns=[name for name in schema.names if name in names])
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, str(error).splitlines()[0] if str(error) else type(error).__name__, _CURE) from error
    for field in schema:
        if field.name not in table.schema.names:
            if field.name in _MAY_BE_ABSENT:
                continue
            raise unreadable(path, f"it has no column {field.name!r}", _CURE)
        if not _alike(kind := table.schema.field(field.name).type, field.type):
            raise unreadable(path, f"column {field.name!r} is {kind} instead of {field.type}", _CURE)
        if field.name not in _NULLABLE and (count := _nulls(table.column(field.name))):
            raise unreadable(path, f"column {field.name!r} has {count} empty values", _CURE)
    return rows


def _alike(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Parquet gives the values of lists names of its own."""
    if pa.types.is_list(kind) and pa.types.is_list(wanted):
        return _alike(kind.value_type, wanted.value_type)
    return bool(kind == wanted)


def _nulls(column: pa.ChunkedArray) -> int:
    count = int(column.null_count)
    return count + _nulls(pc.list_flatten(column)) if pa.types.is_list(column.type) else count


@contextmanager
def _row(path: Path, number: int) -> Iterator[None]:
    """What a row of the table says wrongly becomes a RecordError that names it."""
    try:
        yield
    except KeyError as error:
        raise unreadable(path, f"row {number} is of {error}, which is not there now", _CURE) from error
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"row {number}: {error}", _CURE) from error


def _parts(text: str) -> dict[str, float]:
    found = json.loads(text)
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise ValueError(f"score_parts is {text[:60]!r}, not an object of numbers")
    return found


def _part_reasons(text: str | None) -> dict[str, str]:
    found = json.loads(text) if text else {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"part_reasons is {str(text)[:60]!r}, not an object of texts")
    return found


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    publish_file(path, lambda temporary: pq.write_table(pa.Table.from_pylist(rows, schema), temporary))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


def _storable(text: str) -> str:
    """Half a surrogate pair, which a byte-level tokenizer can emit, has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()
