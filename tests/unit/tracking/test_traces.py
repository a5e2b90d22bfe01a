"""Rows as traces, and how they are sent: what a person sees, which ids, and what is sent again after an error."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Feedback, Span, TraceInfo

from raylign.config import parse_config
from raylign.config.evaluation import GOLD
from raylign.errors import RecordError, TrackingError
from raylign.records import Candidate, Preference, Prompt, Score
from raylign.run.tables import write_candidates, write_preferences
from raylign.tracking.feed import FeedState, TraceFile, Tracing, _TraceWaits, tracing
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.trace_feed import TRACES_PER_CALL, TraceFeed
from raylign.tracking.trace_rows import Trace, read_traces
from raylign.tracking.writer import MlflowWriter

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz123456"
SCORING = {
    "type": "weighted",
    "weights": {"quality": 1.0, "brevity": 0.2},
    "scorers": {
        "quality": {"type": "judge", "base_url": "http://judge:8000/v1", "model": "Qwen/Qwen3-32B"},
        "brevity": {"type": "function"},
    },
}


def prompt(number: int, content: object = "ask") -> Prompt:
    return Prompt(f"h{number:06d}", ({"role": "user", "content": content},), (1,))


def candidate(of: Prompt, index: int, text: str, version: int = 4) -> Candidate:
    return Candidate(of.id, index, (3,), (-0.1,), text, "stop", version, 1)


def state(preferences: float = 0.1) -> FeedState:
    config = parse_config({"scoring": SCORING, "tracking": {"traced_preferences": preferences}})
    asked = tracing(config.tracking, config.scored_parts)
    return FeedState(campaign="c" * 32, name="run", run_id="r", experiment_id="1", tracing=asked)


def held_out(folder: Path, prompts: Sequence[Prompt], texts: Sequence[str], scores: Sequence[Score]) -> TraceFile:
    found = [candidate(own, 0, text) for own, text in zip(prompts, texts, strict=True)]
    write_candidates(folder / "samples.parquet", prompts, found, scores)
    return TraceFile(kind="samples", path="samples.parquet", round=7, time_ms=1_700_000_000_000)


def traces_of(folder: Path, file: TraceFile, owner: FeedState) -> list[Trace]:
    return list(read_traces(folder / file.path, file, owner))


def test_a_completion_shows_its_prompt_answer_and_who_scored_it(tmp_path: Path) -> None:
    parts = {"quality": 0.75, "quality/rating": 7.0, "brevity": -0.25}
    scores = [Score(0.5, parts, "clear"), Score(None, {}, "quality: no answer")]
    file = held_out(tmp_path, [prompt(0), prompt(1)], ["yes", "no"], scores)
    first, second = traces_of(tmp_path, file, state())
    assert first.span.inputs == {"messages": [{"role": "user", "content": "ask"}]}
    assert first.span.outputs["choices"][0]["message"] == {"role": "assistant", "content": "yes"}
    assert (first.info.request_preview, first.info.response_preview) == ("ask", "yes")
    assert shown_tags(first) == {"mlflow.traceName": "held-out", "round": "7", "version": "4"}
    assert first.info.trace_metadata == {
        "mlflow.sourceRun": "r",
        "mlflow.trace.session": "run-cccccccc",
        "prompt_id": "h000000",
        "finish_reason": "stop",
    }
    assert first.info.request_time > second.info.request_time, "the newest stands first"
    title = parse_config({"scoring": SCORING}).scored_parts[""].title
    assert [(own.name, own.value, own.source.source_type, own.source.source_id) for own in feedback(first)] == [
        ("score", 0.5, "CODE", title),
        ("score.quality", 0.75, "LLM_JUDGE", "judge Qwen/Qwen3-32B"),
        ("score.quality.rating", 7.0, "LLM_JUDGE", "judge Qwen/Qwen3-32B"),
        ("score.brevity", -0.25, "CODE", "raylign.scoring.vader:compound"),
    ]
    assert [own.rationale for own in feedback(first)] == ["clear", None, None, None]
    (unscored,) = feedback(second)
    assert unscored.value is None and unscored.error and unscored.error.error_message == "quality: no answer"


def test_a_gold_scorers_value_has_a_name_of_its_own(tmp_path: Path) -> None:
    file = held_out(tmp_path, [prompt(0)], ["yes"], [Score(0.5, {"quality": 0.5, GOLD: 0.1})])
    (trace,) = traces_of(tmp_path, file, state())
    assert [(own.name, own.value) for own in feedback(trace)] == [("score", 0.5), ("score.quality", 0.5), ("gold", 0.1)]


def shown_tags(trace: Trace) -> dict[str, str]:
    return {key: value for key, value in trace.info.tags.items() if key != "mlflow.trace.spansLocation"}


def feedback(trace: Trace) -> list[Feedback]:
    return cast(list[Feedback], trace.info.assessments)


def test_a_row_is_the_same_trace_whenever_it_is_sent_and_no_other_row_is(tmp_path: Path) -> None:
    prompts = [prompt(number) for number in range(70)]
    file = held_out(tmp_path, prompts, ["text"] * 70, [Score(0.5)] * 70)
    everything = traces_of(tmp_path, file, state())
    rest = traces_of(tmp_path, file.model_copy(update={"rows": 41}), state())
    assert [trace.info for trace in rest] == [trace.info for trace in everything[41:]]
    ids = {trace.info.trace_id for trace in everything}
    assert len(ids) == len({own.assessment_id for trace in everything for own in feedback(trace)}) == 70
    for other in (
        (file.model_copy(update={"round": 8}), state()),
        (file, state().model_copy(update={"campaign": "d" * 32})),
    ):
        assert ids.isdisjoint(trace.info.trace_id for trace in traces_of(tmp_path, *other))
    assert everything[0].span.trace_id == everything[0].info.trace_id


def test_text_is_data(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}
    contents = [
        f"\x00\ud800 <script> {KEY}",
        [{"type": "text", "text": "see"}, image],
        "![a](z)",
        [["x" * 30_000] * 9],
    ]
    texts = [f"漢 {KEY} password=hunter2hunter2", "![b](http://x.invalid/y.png)", f"{'long ' * 10_000}{KEY}", "c"]
    prompts = [prompt(number, content) for number, content in enumerate(contents)]
    file = held_out(tmp_path, prompts, texts, [Score(0.5, {}, KEY)] * 4)
    found = traces_of(tmp_path, file, state())
    sent = [json.dumps([trace.info.to_dict(), trace.span.inputs, trace.span.outputs]) for trace in found]
    assert all(KEY not in text and "hunter2" not in text and "\\u0000" not in text for text in sent)
    assert "<script>" in sent[0] and found[0].span.outputs["choices"][0]["message"]["content"].startswith(
        "漢 [redacted]"
    )
    assert not any("![" in text for text in sent) and found[1].info.response_preview == "!\\[b](http://x.invalid/y.png)"
    url = found[1].span.inputs["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,AAA") and url.endswith("more characters]") and len(url) <= 100
    assert found[1].info.request_preview == "see"
    assert found[2].span.outputs["choices"][0]["message"]["content"].endswith(" [30040 more characters]")
    assert len(sent[3]) < 120_000
    for trace in found:
        assert trace.span.to_otel_proto() and trace.info.to_proto()
        assert len(trace.info.request_preview or "") <= 1000 >= len(trace.info.response_preview or "")


@pytest.mark.parametrize(
    ("share", "rows"), [(0.0, []), (0.1, [9, 19]), (0.25, [3, 7, 11, 15, 19]), (1.0, [*range(20)])]
)
def test_a_share_of_preferences_shows_both_ends(tmp_path: Path, share: float, rows: list[int]) -> None:
    prompts = [prompt(number) for number in range(20)]
    groups = [tuple(candidate(own, index, f"{index}", 3 + index) for index in (2, 0, 1)) for own in prompts]
    preferences = [
        Preference(own, group, (0.9, 0.5, 0.2), (1.0,) * 3) for own, group in zip(prompts, groups, strict=True)
    ]
    write_preferences(tmp_path / "preferences.parquet", preferences)
    scored = [Score(0.0, {"quality": float(own.index)}) for group in groups for own in group]
    write_candidates(tmp_path / "candidates.parquet", prompts, [own for group in groups for own in group], scored)
    file = TraceFile(kind="preferences", path="preferences.parquet", round=1, time_ms=10**12)
    found = traces_of(tmp_path, file, state(share))
    assert [trace.row for trace in found] == rows
    for trace in found:
        assert trace.span.outputs == {"chosen": "2", "rejected": "1"}
        assert shown_tags(trace) == {"mlflow.traceName": "preference", "round": "1", "version": "4, 5"}
        values = {own.name: own.value for own in feedback(trace)}
        assert values == {
            "training.margin": pytest.approx(0.7),
            "training.chosen": 0.9,
            "training.chosen.quality": 2.0,
            "training.rejected": 0.2,
            "training.rejected.quality": 1.0,
        }


def test_a_table_of_something_else_is_named(tmp_path: Path) -> None:
    good: dict[str, object] = {
        "prompt_id": "h0",
        "index": 0,
        "messages": "[]",
        "text": "x",
        "score": 0.5,
        "score_parts": "{}",
    }
    good |= {"score_reason": "", "finish_reason": "stop", "policy_version": 1}
    file, path = (
        TraceFile(kind="samples", path="samples.parquet", round=1, time_ms=10**15),
        tmp_path / "samples.parquet",
    )
    pq.write_table(pa.Table.from_pylist([good]), path)
    (latest,) = traces_of(tmp_path, file, state())
    assert latest.span.to_otel_proto() and latest.info.to_dict()["request_time"]
    deep = "[" * 100_000
    wrong: list[dict[str, object]] = [
        {"text": None},
        {"text": ["x"]},
        {"score": "x"},
        {"messages": "{}"},
        {"messages": deep},
        {"score_parts": "[]"},
    ]
    wrong += [{"score_parts": '{"a": "b"}'}, {"index": None, "text": 3}]
    for change in wrong:
        pq.write_table(pa.Table.from_pylist([good | change]), path)
        with pytest.raises(RecordError, match=r"samples\.parquet"):
            traces_of(tmp_path, file, state())
    path.write_bytes(b"PAR1")
    with pytest.raises(RecordError, match=r"samples\.parquet"):
        traces_of(tmp_path, file, state())


class Store:
    """Keeps what it is sent; the calls whose numbers are in `failing` fail, for good where `passing` is not set."""

    def __init__(self, failing: Sequence[int] = (), passing: bool = True) -> None:
        self.started: list[str] = []
        self.spans: list[list[str]] = []
        self.calls, self._failing, self._passing = 0, failing, passing

    def start_trace(self, info: TraceInfo) -> None:
        self._call()
        self.started.append(info.trace_id)

    def log_spans(self, experiment_id: str, spans: Sequence[Span]) -> None:
        self._call()
        assert experiment_id == "1"
        self.spans.append([span.trace_id for span in spans])

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self._failing:
            error = TrackingError("away")
            error.passing = self._passing
            raise error


def feed_of(store: Store, folder: Path, owner: FeedState) -> TraceFeed:
    return TraceFeed(cast(MlflowStore, store), folder, owner)


def table(folder: Path, rows: int) -> TraceFile:
    prompts = [prompt(number) for number in range(rows)]
    return held_out(folder, prompts, ["text"] * rows, [Score(0.5)] * rows)


def test_each_trace_is_a_request_and_their_spans_go_together(tmp_path: Path) -> None:
    store, owner, rows = Store(), state(), TRACES_PER_CALL + 5
    feed, steps = feed_of(store, tmp_path, owner), 0
    feed.add(table(tmp_path, rows))
    while owner.traces:
        before = store.calls
        feed.step()
        assert store.calls - before <= 1
        steps += 1
    assert store.calls == steps == rows + 2
    assert [len(batch) for batch in store.spans] == [TRACES_PER_CALL, 5]
    assert store.started == [trace for batch in store.spans for trace in batch]
    assert not feed.step()


@pytest.mark.parametrize("failing", [(1,), (3, 4), (TRACES_PER_CALL + 1,), (TRACES_PER_CALL + 7,)])
def test_what_fails_is_asked_again_and_nothing_twice(tmp_path: Path, failing: tuple[int, ...]) -> None:
    store, owner = Store(failing), state()
    feed, errors = feed_of(store, tmp_path, owner), 0
    feed.add(table(tmp_path, TRACES_PER_CALL + 5))
    while owner.traces:
        try:
            feed.step()
        except TrackingError:
            errors += 1
    assert errors == len(failing)
    assert len(store.started) == len(set(store.started)) == TRACES_PER_CALL + 5
    assert [trace for batch in store.spans for trace in batch] == store.started


def test_another_process_goes_on_within_a_file(tmp_path: Path) -> None:
    first, owner = Store(), state()
    feed = feed_of(first, tmp_path, owner)
    feed.add(table(tmp_path, TRACES_PER_CALL + 5))
    saved = owner.model_dump_json()
    for _ in range(TRACES_PER_CALL + 3):
        if feed.step():
            saved = owner.model_dump_json()
    second, again = Store(), FeedState.model_validate_json(saved)
    assert again.traces[0].rows == TRACES_PER_CALL
    rest = feed_of(second, tmp_path, again)
    while again.traces:
        rest.step()
    assert first.started[TRACES_PER_CALL:] == second.started[:2], "what had no spans yet comes again under its id"
    assert len({*first.started, *second.started}) == TRACES_PER_CALL + 5
    assert len(second.spans[0]) == 5


def test_what_mlflow_refuses_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, owner = Store((2,), passing=False), state()
    feed = feed_of(store, tmp_path, owner)
    feed.add(table(tmp_path, 5))
    with caplog.at_level(logging.WARNING):
        while owner.traces:
            feed.step()
    assert len(store.started) == len(store.spans[0]) == 4
    assert "does not take trace tr-" in caplog.text


class Broken(Store):
    """Fails at every request with one of these rows' traces, and at all where it is `away`."""

    def __init__(self, rows: Sequence[int] = (), spans: Sequence[int] = (), away: bool = False) -> None:
        super().__init__()
        self._rows, self._spans, self._away = rows, spans, away

    def start_trace(self, info: TraceInfo) -> None:
        self._fail_at([info], self._rows)
        super().start_trace(info)

    def log_spans(self, experiment_id: str, spans: Sequence[Span]) -> None:
        self._fail_at(spans, self._spans)
        super().log_spans(experiment_id, spans)

    def has(self, run_id: str) -> bool:
        self._fail_at([], [])
        return True

    def _fail_at(self, traces: Sequence[TraceInfo | Span], rows: Sequence[int]) -> None:
        broken = {self.ids[row] for row in rows}
        if self._away or broken & {trace.trace_id for trace in traces}:
            raise TrackingError("too many 500 error responses")

    ids: Sequence[str] = ()


def worked_off(store: Broken, folder: Path, owner: FeedState, file: TraceFile | None, most: int = 200) -> int:
    """How often waiting was asked for until nothing is pending."""
    if file is not None:
        store.ids = [trace.info.trace_id for trace in traces_of(folder, file, owner)]
    feed, errors = feed_of(store, folder, owner), 0
    if file is not None:
        feed.add(file)
    for _ in range(most):
        try:
            if not feed.step() and not owner.traces:
                break
        except TrackingError:
            errors += 1
    return errors


@pytest.mark.parametrize(("rows", "spans"), [([2], []), ([], [2]), ([1], [2])])
def test_a_trace_that_mlflow_always_fails_at_is_set_aside_and_tried_again_by_the_next_process(
    rows: list[int], spans: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, owner, file = Broken(rows, spans), state(), table(tmp_path, 5)
    with caplog.at_level(logging.WARNING):
        errors = worked_off(store, tmp_path, owner, file)
    assert errors == 4 * len([*rows, *spans]), "each is tried five times"
    bad = sorted([*rows, *spans])
    assert not owner.traces and [(one.rows, one.until) for one in owner.aside] == [(row, row + 1) for row in bad]
    sent = [trace for batch in store.spans for trace in batch]
    assert sorted(sent) == sorted(own for row, own in enumerate(store.ids) if row not in bad)
    for row in bad:
        assert f"trace {store.ids[row]} (row {row} of samples.parquet) is set aside" in caplog.text
    assert (owner.without_traces, owner.sequence - owner.sent) == (1, 1), "the event of that table is not all there"

    mended, again = Broken(), FeedState.model_validate_json(owner.model_dump_json())
    assert worked_off(mended, tmp_path, again, None) == 0
    assert mended.started == [store.ids[row] for row in bad] and [len(batch) for batch in mended.spans] == [1] * len(
        bad
    )
    assert not again.aside and again.without_traces == 0


def test_an_mlflow_that_is_away_loses_nothing(tmp_path: Path) -> None:
    owner = state()
    assert worked_off(Broken(away=True), tmp_path, owner, table(tmp_path, 5), most=20) == 20
    assert not owner.aside and len(owner.traces) == 1


def test_an_mlflow_that_takes_no_traces_is_waited_for(tmp_path: Path) -> None:
    """Five are set aside, then it is no matter of single traces."""
    store, owner = Broken(range(12)), state()
    errors = worked_off(store, tmp_path, owner, table(tmp_path, 12), most=60)
    assert [one.rows for one in owner.aside] == [0, 1, 2, 3, 4] and len(owner.traces) == 1 and errors == 55


def test_a_damaged_table_costs_its_own_traces_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, owner = Store(), state()
    feed = feed_of(store, tmp_path, owner)
    good = table(tmp_path, 3)
    feed.add(good.model_copy(update={"path": "gone.parquet"}))
    feed.add(good.model_copy(update={"path": "../outside.parquet"}))
    feed.add(good)
    with caplog.at_level(logging.WARNING):
        while owner.traces:
            feed.step()
    assert len(store.started) == 3
    assert [record.getMessage().count("its traces is left out") for record in caplog.records] == [1, 1]


def test_a_table_that_is_written_again_replaces_itself(tmp_path: Path) -> None:
    store, owner = Store(), state()
    feed = feed_of(store, tmp_path, owner)
    feed.add(table(tmp_path, 5))
    feed.step()
    feed.add(table(tmp_path, 2))
    while owner.traces:
        feed.step()
    assert [len(batch) for batch in store.spans] == [2]


def test_what_is_traced_follows_the_options() -> None:
    config = parse_config({"tracking": {"traces": False}})
    assert tracing(config.tracking, config.scored_parts) is None
    config = parse_config({})
    assert tracing(config.tracking, {}) == Tracing(preferences=0.1)


class Writer:
    """Computes for so long for each trace, then fails if it is to."""

    def __init__(self, seconds: float, fails: bool) -> None:
        self._seconds, self._fails = seconds, fails

    def send_trace(self) -> bool:
        began = time.thread_time()
        while time.thread_time() - began < self._seconds:
            pass
        if self._fails:
            raise TrackingError("away")
        return True


def test_traces_take_their_share_of_a_core_and_no_more() -> None:
    waits = _TraceWaits()
    assert waits.send(cast(MlflowWriter, Writer(0.02, False)))
    assert 3.9 < waits.until - time.monotonic() < 20


def test_a_trace_that_fails_is_tried_less_and_less_often() -> None:
    waits, pauses = _TraceWaits(), []
    for _ in range(9):
        assert waits.send(cast(MlflowWriter, Writer(0, True)))
        pauses.append(round(waits.until - time.monotonic()))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    waits.send(cast(MlflowWriter, Writer(0, False)))
    assert waits.send(cast(MlflowWriter, Writer(0, True))) and round(waits.until - time.monotonic()) == 1


def test_traces_turned_off_drop_what_waits(tmp_path: Path) -> None:
    owner = state()
    feed = feed_of(Store(), tmp_path, owner)
    feed.add(table(tmp_path, 5))
    feed.step()
    feed.drop()
    assert not owner.traces and not feed.step()
