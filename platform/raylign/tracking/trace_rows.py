"""Rows of a run's tables as MLflow traces: a held-out completion, or a preference, with its scores as feedback.

Ids and times come from the run, the round and the row, so that the same row is the same trace however often it is sent.
Prompts and completions are data: secrets in them are withheld, long ones are cut, what UTF-8 cannot hold is replaced.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from mlflow.entities import AssessmentError, AssessmentSource, Feedback, Span, TraceInfo, TraceLocation, TraceState
from mlflow.tracing.constant import SpanAttributeKey, SpansLocation, TraceMetadataKey, TraceTagKey
from mlflow.tracing.utils import build_otel_context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Status, StatusCode

from raylign.boundary.secrets import without_secrets
from raylign.config.evaluation import GOLD
from raylign.report.text import without_images
from raylign.run.files import unreadable
from raylign.tracking.facts import redacted
from raylign.tracking.feed import FeedState, ScoreSource, TraceFile, Tracing

ROWS_READ = 32
"""Rows in memory at once."""
_MAX_TEXT = 20_000
"""Characters of one text in a trace."""
_MAX_DATA = 100
"""Characters of an image that a prompt holds as text."""
_MAX_TEXTS = 100_000
"""Characters of all texts of a prompt."""
_MAX_PREVIEW = 1000
"""What MLflow's databases hold."""
_MAX_REASON = 4000
_MAX_PARTS = 50
_MAX_NAME = 250
_MAX_SESSION = 100
_ID = 32
_HELD_OUT = (
    *("prompt_id", "index", "messages", "text", "score", "score_parts", "score_reason", "finish_reason"),
    "policy_version",
)
_PREFERENCE = ("prompt_id", "messages", "chosen", "rejected", "scores", "indices")
_CANDIDATE = ("prompt_id", "index", "score_parts", "score_reason", "policy_version")
_LATER = "part_reasons"
"""A column that earlier versions did not write."""
_OF_A_DAMAGED_TABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, pa.ArrowException),
)
_LATEST_MS = 2**62 // 10**6
"""In nanoseconds, MLflow's spans and databases hold it."""
_CURE = "restore it from a copy"


@dataclass(frozen=True, slots=True)
class Trace:
    """What MLflow is sent of one row; `row` counts from 0."""

    row: int
    info: TraceInfo
    span: Span


def read_traces(path: Path, file: TraceFile, state: FeedState) -> Iterator[Trace]:
    """The traces of `file`, which is at `path`, from row `file.rows` on, some rows in memory at a time.

    Raises RecordError when it is no such table.
    """
    held_out = file.kind == "samples"
    columns, share = (_HELD_OUT, 1.0) if held_out else (_PREFERENCE, _asked(state).preferences)
    try:
        build = _held_out if held_out else _Preferences(path.parent).trace
        for number, row in _rows(path, columns, file.rows):
            # Evenly over the table, and the same rows each time.
            if math.floor((number + 1) * share) > math.floor(number * share):
                yield build(number, row, file, state)
    except _OF_A_DAMAGED_TABLE as error:
        raise unreadable(path, f"{type(error).__name__}: {error}".partition("\n")[0], _CURE) from error


def _asked(state: FeedState) -> Tracing:
    return state.tracing or Tracing(preferences=0)


def _rows(path: Path, columns: Sequence[str], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with pq.ParquetFile(path) as file:
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise ValueError(f"it has no column {missing[0]!r}")
        start = 0
        for batch in file.iter_batches(ROWS_READ, columns=_present(file, columns)):
            if start + batch.num_rows > first:
                for place, row in enumerate(batch.to_pylist(), start):
                    if place >= first:
                        yield place, row
            start += batch.num_rows


def _present(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """`columns`, and the later one where the table has it."""
    return [*columns, *([_LATER] if _LATER in file.schema_arrow.names else [])]


def _held_out(number: int, row: Mapping[str, Any], file: TraceFile, state: FeedState) -> Trace:
    text = _shown(row["text"])
    scores = _scores("score", row["score"], row)
    answer = {"role": "assistant", "content": text}
    return _trace(
        number,
        file,
        state,
        name="held-out",
        key=f"{row['prompt_id']}/{row['index']}",
        messages=row["messages"],
        outputs={"choices": [{"index": 0, "message": answer, "finish_reason": row["finish_reason"]}]},
        preview=text,
        scores=scores,
        version=str(row["policy_version"]),
        about={"prompt_id": row["prompt_id"], "finish_reason": row["finish_reason"]},
    )


class _Preferences:
    """Traces of preferences, with what tables of candidates beside theirs know of them, if there are any."""

    def __init__(self, folder: Path) -> None:
        tables = []
        for path in sorted(folder.glob("candidates*.parquet")):
            with pq.ParquetFile(path) as file:
                tables.append(file.read(columns=_present(file, _CANDIDATE)))
        self._table = pa.concat_tables(tables, promote_options="default") if tables else None

    def trace(self, number: int, row: Mapping[str, Any], file: TraceFile, state: FeedState) -> Trace:
        """The best candidate of the row against its worst."""
        chosen, rejected = _shown(row["chosen"]), _shown(row["rejected"])
        ends = (0, -1)
        values = [row["scores"][end] for end in ends]
        known = [self._candidate(row["prompt_id"], row["indices"][end]) for end in ends]
        scores = [_Given("training.margin", "", values[0] - values[1])]
        for name, value, candidate in zip(("chosen", "rejected"), values, known, strict=True):
            scores += _scores(f"training.{name}", value, candidate)
        versions = sorted({candidate["policy_version"] for candidate in known if candidate})
        half = _MAX_PREVIEW // 2 - len("rejected: ")
        return _trace(
            number,
            file,
            state,
            name="preference",
            key=f"{row['prompt_id']}/{number}",
            messages=row["messages"],
            outputs={"chosen": chosen, "rejected": rejected},
            preview=f"chosen: {_cut(chosen, half)}\nrejected: {_cut(rejected, half)}",
            scores=scores,
            version=", ".join(map(str, versions)),
            about={"prompt_id": row["prompt_id"]},
        )

    def _candidate(self, prompt: str, index: int) -> dict[str, Any]:
        if self._table is None:
            return {}
        found = self._table.filter((pc.field("prompt_id") == prompt) & (pc.field("index") == index)).to_pylist()
        return found[0] if found else {}


@dataclass(frozen=True, slots=True)
class _Given:
    """A value under `name`, given by the scorer of `part`, with its reason if it told one; or none, and why."""

    name: str
    part: str
    value: float | None
    reason: str = ""


def _scores(name: str, value: float | None, row: Mapping[str, Any]) -> list[_Given]:
    """The score and its parts: `score`, `score.quality`, `gold`, `training.chosen`; `row` is the candidate's, or empty.

    MLflow's pages go by the alphabet, and show of a name what stands behind its last `/`.
    """
    parts, told = json.loads(row.get("score_parts") or "{}"), json.loads(row.get(_LATER) or "{}")
    own = [
        _Given(_named(name, part), part, value, told.get(part, "")) for part, value in list(parts.items())[:_MAX_PARTS]
    ]
    return [_Given(name, "", value, row.get("score_reason", "")), *own]


def _named(name: str, part: str) -> str:
    """The gold scorer's value is no part of the score."""
    return "gold" if part == GOLD else f"{name}.{part.replace('/', '.')}"


def _trace(
    row: int,
    file: TraceFile,
    state: FeedState,
    *,
    name: str,
    key: str,
    messages: str,
    outputs: Mapping[str, Any],
    preview: str,
    scores: Sequence[_Given],
    version: str,
    about: Mapping[str, str],
) -> Trace:
    """`about` is metadata: MLflow's table has room for few tags."""
    asked = _messages(messages)
    digest = hashlib.sha256("\n".join((state.campaign, name, str(file.round), key)).encode()).hexdigest()
    # The newest stands first on MLflow's pages: rounds so, the rows of a round in their own order.
    time_ms = min(max(0, file.time_ms - row), _LATEST_MS)
    info = TraceInfo(
        trace_id=f"tr-{digest[:_ID]}",
        trace_location=TraceLocation.from_experiment_id(state.experiment_id),
        request_time=time_ms,
        state=TraceState.OK,
        request_preview=_cut(_last_text(asked), _MAX_PREVIEW),
        response_preview=_cut(preview, _MAX_PREVIEW),
        execution_duration=0,
        trace_metadata={
            TraceMetadataKey.SOURCE_RUN: state.run_id,
            TraceMetadataKey.TRACE_SESSION: _session(state),
            **about,
        },
        tags={
            TraceTagKey.TRACE_NAME: name,
            # Until its spans are there, MLflow would look for them among files, and fail.
            TraceTagKey.SPANS_LOCATION: SpansLocation.TRACKING_STORE.value,
            "round": str(file.round),
            **({"version": version} if version else {}),
        },
    )
    info.assessments = [_feedback(given, info.trace_id, state, time_ms) for given in scores]
    return Trace(row, info, _span(info, digest, asked, outputs))


def _session(state: FeedState) -> str:
    return f"{state.name[:_MAX_SESSION]}-{state.campaign[:8]}"


def _feedback(given: _Given, trace_id: str, state: FeedState, time_ms: int) -> Feedback:
    source = _source(given.part, _asked(state).scorers)
    name = _shown(given.name)[:_MAX_NAME]
    reason = _cut(_shown(given.reason), _MAX_REASON)
    unscored = given.value is None or not math.isfinite(given.value)
    feedback = Feedback(
        name=name,
        value=None if unscored else given.value,
        error=AssessmentError("UNSCORED", reason) if unscored else None,
        source=AssessmentSource("LLM_JUDGE" if source.judge else "CODE", source.title),
        trace_id=trace_id,
        # Its pages show Markdown, where lines alone would run together.
        rationale=reason.replace("\n", "\n\n") or None,
        create_time_ms=time_ms,
        last_update_time_ms=time_ms,
    )
    feedback.assessment_id = f"a-{hashlib.sha256(f'{trace_id}/{name}'.encode()).hexdigest()[:_ID]}"
    return feedback


def _source(part: str, scorers: Mapping[str, ScoreSource]) -> ScoreSource:
    """That of the part or, where it is a part of a member's own, of the member."""
    while part and part not in scorers:
        part = part.rpartition("/")[0]
    return scorers.get(part, ScoreSource())


def _span(info: TraceInfo, digest: str, messages: Sequence[Any], outputs: Mapping[str, Any]) -> Span:
    time_ns = info.request_time * 1_000_000
    attributes = {
        SpanAttributeKey.REQUEST_ID: info.trace_id,
        SpanAttributeKey.SPAN_TYPE: "CHAT_MODEL",
        SpanAttributeKey.INPUTS: {"messages": messages},
        SpanAttributeKey.OUTPUTS: outputs,
    }
    return Span(
        ReadableSpan(
            name=info.tags[TraceTagKey.TRACE_NAME],
            context=build_otel_context(int(digest[:_ID], 16), int(digest[_ID : _ID + 16], 16)),
            start_time=time_ns,
            end_time=time_ns,
            attributes={key: json.dumps(value, ensure_ascii=False) for key, value in attributes.items()},
            status=Status(StatusCode.OK),
            resource=Resource.get_empty(),
        )
    )


def _messages(text: str) -> list[Any]:
    """Messages from JSON, safe to show."""
    left = _MAX_TEXTS

    def shown(value: str) -> str:
        nonlocal left
        most = _MAX_DATA if value.startswith("data:") else _MAX_TEXT
        cut = _cut(_storable(value), max(0, min(most, left)))
        left -= len(cut)
        return cut

    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"its messages are {text[:60]!r}, no list")
    return [_with_texts(message, shown) for message in redacted({"messages": found})["messages"]]


def _with_texts(value: Any, shown: Callable[[str], str]) -> Any:
    match value:
        case str():
            return shown(value)
        case Mapping():
            return {shown(str(key)): _with_texts(item, shown) for key, item in value.items()}
        case list() | tuple():
            return [_with_texts(item, shown) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def _last_text(messages: Sequence[Any]) -> str:
    content = messages[-1].get("content") if messages and isinstance(messages[-1], Mapping) else ""
    if isinstance(content, list):
        content = " ".join(str(part["text"]) for part in content if isinstance(part, Mapping) and "text" in part)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _shown(text: str) -> str:
    """Without secrets, and at most so long."""
    kept = without_secrets(text[: 2 * _MAX_TEXT])
    if len(text) > 2 * _MAX_TEXT:
        kept = kept[: len(kept) // 2]  # the end may be half of a secret
    kept = kept[:_MAX_TEXT]
    return _storable(kept if len(text) <= _MAX_TEXT else f"{kept} [{len(text) - _MAX_TEXT} more characters]")


def _storable(text: str) -> str:
    """As every database can hold it, and every browser may show it."""
    return without_images(text.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}"))


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    note = f" [{len(text) - most} more characters]"
    return f"{text[: max(0, most - len(note))]}{note}"
