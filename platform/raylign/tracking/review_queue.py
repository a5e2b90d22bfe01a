"""MLflow's side of a review: questions, queues, a trace for each pair, and what people say of them."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from mlflow.entities import Assessment, AssessmentSourceType, Feedback, Span, TraceInfo, TraceLocation, TraceState
from mlflow.exceptions import MlflowException
from mlflow.genai.label_schemas import InputCategorical, InputText, LabelSchema
from mlflow.genai.review_queues import ReviewQueueItem, ReviewStatus
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.tracing.client import TracingClient

from raylign.boundary.secrets import without_credentials
from raylign.chunks import chunks
from raylign.errors import TrackingError
from raylign.report.text import without_images
from raylign.tracking.mlflow_store import MlflowStore

CHOICES = ("A", "B", "tie")
WHICH, WHY = "Which answer is better?", "Why?"
"""Names of the questions: what people read, and the names of their feedback."""
_HOW = (
    "Read the prompt and both answers; take tie if neither is better. If you do not see them, close MLflow's Assistant "
    "at the right, or make the window wider."
)
TRACE_PREFIX = "tr-"
_LONGEST_WHY = 2000
_PER_CALL, _PER_PAGE = 50, 100
_UNKNOWN, _TAKEN = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
_PREVIEW = 1000
"""Characters that MLflow's open-source stores keep of a preview."""
_CUT = " ... (the rest: View full trace)"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """A pair as people see it; `id` has 32 hex digits."""

    id: str
    prompt: str
    answer_a: str
    answer_b: str
    tags: Mapping[str, str]

    @property
    def trace_id(self) -> str:
        return f"{TRACE_PREFIX}{self.id}"


@dataclass(frozen=True, slots=True)
class Given:
    """What one person has put down for one question; `choice` is whatever stands there. `time` is in milliseconds."""

    id: str
    reviewer: str
    choice: object
    why: str
    time: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a queue's questions came to: the answers, and the ids that MLflow does not know, or that people declined."""

    given: tuple[Given, ...]
    unknown: frozenset[str]
    declined: frozenset[str]
    strangers: int
    """Items of the queue that were not asked about."""


class ReviewQueue(MlflowStore):
    """A queue of one experiment. Every method raises TrackingError, whose `passing` says whether waiting may help."""

    def __init__(self, uri: str, experiment: str, name: str) -> None:
        """The queue called `name` of the experiment called `experiment`; neither needs to be there."""
        super().__init__(uri)
        self._name, self._experiment = name, self.experiment(experiment)
        self._traces: AbstractStore = self._ask(lambda: TracingClient(uri).store)

    def send(self, questions: Sequence[Question]) -> int:
        """Put into the queue what is not there, each once; returns how many were new to it.

        What is missing of queue, questions and traces is made, so that a call that was cut off is made good by another.
        """
        queue_id = self._queue_id() or self._new_queue()
        there = {item.item_id for item in self._items(queue_id)}
        missing = [question for question in questions if question.trace_id not in there]
        for chunk in chunks(missing, _PER_CALL):
            self._put_traces(chunk)
            ids = [question.trace_id for question in chunk]
            self._ask(partial(self._traces.add_items_to_review_queue, queue_id, item_ids=ids))
        return len(missing)

    def read(self, ids: Sequence[str]) -> Read:
        """What people said of the questions `ids`, the newest of each person. A deleted queue takes no answer away."""
        given: list[Given] = []
        known: set[str] = set()
        for chunk in chunks(ids, _PER_CALL):
            traces = [f"{TRACE_PREFIX}{own}" for own in chunk]
            for info in self._ask(partial(self._traces.batch_get_trace_infos, traces)):
                own = str(info.trace_id).removeprefix(TRACE_PREFIX)
                known.add(own)
                given += _given(own, info.assessments)
        queue_id = self._queue_id()
        items = [*self._items(queue_id)] if queue_id else []
        declined = {item.item_id.removeprefix(TRACE_PREFIX) for item in items if item.status == ReviewStatus.DECLINED}
        strangers = sum(item.item_id.removeprefix(TRACE_PREFIX) not in set(ids) for item in items)
        return Read(tuple(given), frozenset(ids) - known, frozenset(declined & set(ids)), strangers)

    def address(self) -> str:
        """Where people answer: the queue's page, or for a database the command that serves it."""
        shown = without_credentials(self._uri)
        page = f"#/experiments/{self._experiment}/review-queue"
        if queue_id := self._queue_id():
            page = f"{page}?selectedQueueId={queue_id}"
        if self._uri.startswith(("http://", "https://")):
            return f"{shown.rstrip('/')}/{page}"
        return f"http://127.0.0.1:5000/{page} (served by: mlflow ui --backend-store-uri {shown})"

    def _queue_id(self) -> str | None:
        found = self._found(lambda: self._traces.get_review_queue_by_name(self._experiment, name=self._name))
        return None if found is None else str(found.queue_id)

    def _new_queue(self) -> str:
        # The page shows the newest first.
        why = self._schema(WHY, InputText(_LONGEST_WHY), "A sentence is enough; it may stay empty.")
        which = self._schema(WHICH, InputCategorical([*CHOICES]), _HOW)
        made = self._made(
            lambda: self._traces.create_review_queue(
                self._experiment, name=self._name, queue_type="custom", schema_ids=[which, why]
            )
        )
        found = str(made.queue_id) if made else self._queue_id()
        if found is None:
            raise TrackingError(f"the review queue {self._name!r} is made and removed at once")
        return found

    def _schema(self, name: str, kind: InputCategorical | InputText, instruction: str) -> str:
        """The id of a question, which all runs of an experiment share. Raises TrackingError if it asks otherwise."""

        def existing() -> LabelSchema | None:
            return self._found(lambda: self._traces.get_label_schema_by_name(self._experiment, name))

        schema = existing() or self._made(
            lambda: self._traces.create_label_schema(
                self._experiment, name=name, type="feedback", input=kind, instruction=instruction
            )
        )
        schema = schema or existing()
        options = schema.input.options if schema and isinstance(schema.input, InputCategorical) else []
        if schema is None or type(schema.input) is not type(kind) or (name == WHICH and not {*CHOICES} <= {*options}):
            error = TrackingError(f"the question {name!r} of this experiment is another than raylign asks")
            error.passing, error.cure = False, f"rename it in MLflow (Review, Manage questions); {name!r} is made anew"
            raise error
        return str(schema.schema_id)

    def _items(self, queue_id: str) -> Iterator[ReviewQueueItem]:
        token = None
        while True:
            ask = partial(self._traces.list_review_queue_items, queue_id, max_results=_PER_PAGE, page_token=token)
            page: PagedList[ReviewQueueItem] = self._ask(ask)
            yield from page
            if not (token := page.token):
                return

    def _put_traces(self, questions: Sequence[Question]) -> None:
        """Each with its one span; one that is there already stays as it is, with what people said of it."""
        now = time.time_ns()
        for question in questions:
            self._ask(partial(self._traces.start_trace, _info(question, self._experiment, now)))
        spans = [_span(question, now) for question in questions]
        self._ask(lambda: self._traces.log_spans(self._experiment, spans))

    def _found(self, ask: Callable[[], T]) -> T | None:
        """What `ask` gives; None where MLflow knows nothing of the kind."""
        return self._unless(_UNKNOWN, ask)

    def _made(self, make: Callable[[], T]) -> T | None:
        """What `make` gives; None where another process was first."""
        return self._unless(_TAKEN, make)

    def _unless(self, code: str, ask: Callable[[], T]) -> T | None:
        try:
            return self._ask(ask)
        except TrackingError as error:
            if isinstance(error.__cause__, MlflowException) and error.__cause__.error_code == code:
                return None
            raise


def _given(own: str, assessments: Sequence[Assessment]) -> Iterator[Given]:
    """The newest choice of each person, with the newest reason."""
    latest: dict[tuple[str, str], Feedback] = {}
    for found in sorted(assessments, key=lambda one: one.last_update_time_ms or 0):
        if (
            isinstance(found, Feedback)
            and found.source.source_type == AssessmentSourceType.HUMAN
            and found.valid is not False
        ):
            latest[str(found.source.source_id), str(found.name)] = found
    for (reviewer, name), feedback in latest.items():
        if name == WHICH:
            reason = latest.get((reviewer, WHY))
            why = reason.value if reason is not None and isinstance(reason.value, str) else feedback.rationale or ""
            yield Given(own, reviewer, feedback.value, str(why), int(feedback.last_update_time_ms or 0))


def _previews(question: Question) -> tuple[str, str]:
    """What the page of a review shows at once: the prompt, and both answers, of which each has half of the room.

    The page reads Markdown: quoted, an answer that leaves a block of code open does not take in the other one.
    """
    frame = "**Answer A**\n\n{}\n\n---\n\n**Answer B**\n\n{}"
    room = (_PREVIEW - len(frame)) // 2
    answers = (_cut(_quoted(text), room) for text in (question.answer_a, question.answer_b))
    return _cut(without_images(question.prompt), _PREVIEW), frame.format(*answers)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in without_images(text).split("\n"))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - len(_CUT)]}{_CUT}"


def _info(question: Question, experiment_id: str, now_ns: int) -> TraceInfo:
    request, response = _previews(question)
    return TraceInfo(
        trace_id=question.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=now_ns // 1_000_000,
        state=TraceState.OK,
        execution_duration=0,
        request_preview=request,
        response_preview=response,
        trace_metadata={"mlflow.trace_schema.version": "3"},
        tags={"mlflow.traceName": "which is better", "raylign.kind": "review", **question.tags},
    )


def _span(question: Question, now_ns: int) -> Span:
    span_id = hashlib.sha256(question.id.encode()).digest()[:8]
    attributes = {
        "mlflow.traceRequestId": question.trace_id,
        "mlflow.spanInputs": {"prompt": without_images(question.prompt)},
        "mlflow.spanOutputs": {
            "Answer A": without_images(question.answer_a),
            "Answer B": without_images(question.answer_b),
        },
        "mlflow.spanType": "UNKNOWN",
    }
    return Span.from_dict(
        {
            "trace_id": base64.b64encode(bytes.fromhex(question.id)).decode(),
            "span_id": base64.b64encode(span_id).decode(),
            "parent_span_id": "",
            "name": "which is better",
            "start_time_unix_nano": now_ns,
            "end_time_unix_nano": now_ns,
            "status": {"code": "STATUS_CODE_OK"},
            "attributes": {name: json.dumps(value) for name, value in attributes.items()},
            "events": [],
        }
    )
