"""Reward services, judges and MLflow that answer anything: items stay unscored, runs finish and say what is missing."""

import gzip
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils import request_utils
from typer.testing import CliRunner

import recipes.run
from raylign.config import load_config
from raylign.config.blocks import TrackingBlock
from raylign.config.scoring import HttpScoringBlock, JudgeScoringBlock
from raylign.errors import ScorerError, TrackingError
from raylign.records import Score
from raylign.run.directory import RunDirectory, create_run
from raylign.scoring.http_client import retry_after_s
from raylign.scoring.http_service import HttpScorer
from raylign.scoring.judge import JudgeScorer
from raylign.tracking import transport
from raylign.tracking.journal import JOURNAL_NAME, Journal
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.tracker import open_tracker
from recipes.commands.cli import app
from recipes.run import recorded
from tests.faults import record
from tests.hostile_servers import HEAD, NEVER_WHOLE, Pieces, endless, sending, whole
from tests.judges import Asked, Judged, Reply, group, honest
from tests.mlflow_servers import wait_until
from tests.reward_services import Answer, running
from tests.scorers import of_prompt
from tests.unit.tiny_policy import save_recipe

LIMITED = transport.LimitedAdapter
DEEP = b"[" * 200_000


@cache
def bomb() -> bytes:
    """100 MB in 100 kB, packed where a test sends them: it takes a third of a second."""
    return gzip.compress(b"0" * 10**8)


HOSTILE: dict[str, Pieces] = {
    "empty": whole(b""),
    "a number": whole(b"7"),
    "null": whole(b"null"),
    "a list": whole(b"[]"),
    "an object": whole(b"{}"),
    "page": whole(b"<html>log in</html>"),
    "no UTF-8": whole(b"\xff\xfe{"),
    "half": whole(b'{"scores": [1'),
    "deep": whole(b'{"scores": ' + DEEP),
    "deep in an object": whole(b'{"a":' * 100_000),
    "longest integer": whole(b'{"scores": [' + b"9" * 10_000 + b"]}"),
    "charset": whole(b"{}", "Content-Type: application/json; charset=base64"),
    "charset of an error": whole(b"no", "Content-Type: text/plain; charset=base64", status=400),
    "bomb": lambda: whole(bomb(), "Content-Encoding: gzip")(),
    "bomb of an error": lambda: whole(bomb(), "Content-Encoding: gzip", status=500)(),
    "endless": endless(HEAD + b"Connection: close\r\n\r\n", b" " * 65536),
    "redirect": whole(b"", "Location: file:///etc/passwd", status=307),
    "no HTTP": lambda: [b"SSH-2.0-OpenSSH\r\n"],
    "nothing": lambda: [],
    "status": whole(b"", status=999),
    "wait": whole(b"", f"Retry-After: {'9' * 400}", status=503),
    "wait longer": whole(b"", f"Retry-After: {'9' * 5000}", status=429),
    "wait until never": whole(b"", f"Retry-After: Mon, 01 Jan {'9' * 20} 00:00:00 GMT", status=429),
    "cookies": whole(b"{}", "Set-Cookie: a=\x80; expires=never; Max-Age=" + "9" * 400),
    **NEVER_WHOLE,
}


def limit_s(pieces: Pieces) -> float:
    """Seconds of a request: an answer that never ends takes them all, and no other needs an end to its time."""
    return 0.2 if pieces in NEVER_WHOLE.values() else 300.0


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FIRST_WAIT_S", 0.01), ("LONGEST_WAIT_S", 0.02), ("JITTER_S", 0.01)):
        monkeypatch.setattr(f"raylign.scoring.http_client.{name}", seconds)


@pytest.mark.fault
@pytest.mark.parametrize("pieces", HOSTILE.values(), ids=HOSTILE)
def test_items_of_a_reward_service_stay_unscored(pieces: Pieces) -> None:
    for protocol in ("raylign", "openrlhf"):
        with sending(pieces) as url:
            options = {"protocol": protocol, "timeout_s": limit_s(pieces), "retries": 0, "max_unscored": 1.0}
            (score,) = HttpScorer(HttpScoringBlock(url=f"{url}/", **options)).score(of_prompt("p", "a"))
        assert score.value is None and score.reason and len(score.reason) < 600 and score.reason.isprintable()
    record("reward service that answers anything", "its answer, or what is none", lost="the item stays unscored")


@pytest.mark.fault
@pytest.mark.parametrize("pieces", HOSTILE.values(), ids=HOSTILE)
def test_a_judge_that_answers_anything_is_refused(pieces: Pieces) -> None:
    with sending(pieces) as url:
        options = {"timeout_s": limit_s(pieces), "retries": 0, "max_unscored": 1.0}
        with pytest.raises(ScorerError, match="^the judge m at http://127.0.0.1:") as caught:
            JudgeScorer(JudgeScoringBlock(base_url=f"{url}/v1", model="m", **options)).score(of_prompt("p", "a"))
    assert len(str(caught.value)) < 700
    record("judge that answers anything", "its answer, or what is none", lost="nothing: refused before scoring")


@pytest.mark.parametrize("tokens", ["1" + "0" * 4000, "-1", "true", '"7"', "1e999", "null", "[]"])
def test_numbers_of_tokens_that_cannot_be_are_not_counted(judged: Judged, tokens: str) -> None:
    usage = f'{{"total_tokens": {tokens}, "prompt_tokens": {tokens}, "completion_tokens": 1}}'

    def answer(asked: Asked) -> Reply:
        content = honest(asked).content
        return Reply(raw=f'{{"choices": [{{"message": {{"content": "{content}"}}}}], "usage": {usage}}}')

    scorer, _ = judged(answer)
    assert [score.value for score in scorer.score(group("good", "bad"))] == [1.0, 0.0]
    assert scorer.spent.tokens == scorer.spent.tokens_in == 0 and scorer.spent.unmetered == scorer.spent.requests


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0.0),
        ("7", 7.0),
        ("9" * 400, float("inf")),
        ("9" * 5000, float("inf")),
        ("-1", 0.0),
        ("1.5", 0.0),
        ("\u0663", 0.0),
        ("\u00b2", 0.0),
        ("NaN", 0.0),
        ("soon", 0.0),
        ("Mon, 01 Jan 1990 00:00:00 GMT", 0.0),
        (f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 9999 23:59:59 -2359", None),
        ("Mon, 99 Foo 2020 99:99:99 +9999", 0.0),
        ("Mon, 01 Jan 2020 00:00:00 +" + "9" * 40, 0.0),
    ],
)
def test_retry_after_is_read_or_ignored(header: str, seconds: float | None) -> None:
    assert retry_after_s(header) >= 0.0 if seconds is None else retry_after_s(header) == seconds


def test_a_wait_of_a_decimal_of_thousands_of_digits_is_not_waited_for() -> None:
    asked = Answer(status=429, headers={"Retry-After": "9" * 400}, raw="slow down")
    with running(lambda posted: asked) as server:
        block = HttpScoringBlock(url=server.url, timeout_s=60.0, retries=5, max_unscored=1.0)
        scores = HttpScorer(block).score(of_prompt("p", "a"))
    assert scores == [Score(None, reason="HTTP 429: slow down; asks to wait inf s, scoring.timeout_s=60")]
    assert len(server.asked) == 1


MLFLOW: dict[str, Pieces] = {
    **HOSTILE,
    "experiment of another type": whole(b'{"experiment": 7}'),
    "experiment with a list as id": whole(b'{"experiment": {"experiment_id": [1]}}'),
    "experiment without id": whole(b'{"experiment": {"name": "x", "lifecycle_stage": "active"}}'),
    "id of a page": whole(b'{"experiment": {"experiment_id": "a\\u001b[2J", "lifecycle_stage": "active"}}'),
    "enum": whole(b'{"experiment": {"lifecycle_stage": {"a": 1}}}'),
    "integer": whole(b'{"experiment": {"creation_time": 1' + b"0" * 400 + b"}}"),
    "unknown error": whole(b'{"error_code": {"a": [1]}, "message": 7}', status=500),
    "error of a list": whole(b'["error"]', status=400),
    "refusal": whole(b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no\\u001b[2J"}', status=400),
}
EVENTS = 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setitem(recipes.run._CLOSE_S, "FINISHED", 0.1)
    config = load_config(save_recipe(tmp_path))
    return create_run(config.run, config)


@pytest.fixture
def noticed(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], None]]:
    """Waits until the feed has said that MLflow fails."""
    with caplog.at_level(logging.WARNING):
        yield lambda: wait_until(lambda: "the run goes on" in caplog.text or "takes no more" in caplog.text)


@pytest.mark.fault
@pytest.mark.parametrize("pieces", MLFLOW.values(), ids=MLFLOW)
def test_a_run_whose_mlflow_answers_anything_finishes_and_says_what_is_missing(
    pieces: Pieces, run: RunDirectory, noticed: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    with sending(pieces) as uri:
        tracker = open_tracker(run.path, TrackingBlock(uri=uri))
        with recorded(tracker, run):
            tracker.run_started(run.config(), {})
            tracker.round_started(1)
            noticed()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("raylign", "recipes"))]
    assert lines[-1].startswith(f"MLflow misses {EVENTS} event(s) of this run, all of them safe in")
    assert all(line.isprintable() and len(line) < 700 for line in lines)
    record(
        "MLflow that answers anything", "its answer, or what is none", lost="nothing: the run finishes, sync is left"
    )


@pytest.mark.fault
@pytest.mark.parametrize("name", ["experiment of another type", "body, a byte now and then", "refusal", "endless"])
def test_sync_gives_up_in_time_on_an_mlflow_that_answers_anything(name: str, run: RunDirectory) -> None:
    with Journal(run.path / JOURNAL_NAME) as journal:
        journal.append("campaign_started", {"campaign": "c", "name": "n", "params": {}, "tags": {}})
        journal.append("campaign_finished", {"status": "FINISHED"})
    with sending(MLFLOW[name]) as uri:
        result = CliRunner().invoke(app, ["sync", str(run.path), "--uri", uri, "--timeout", "1"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.stderr.startswith(f"error: MLflow at {uri} ") and "it misses 2 of 2 events" in result.stderr
    record("MLflow that answers anything to sync", name, lost="nothing: the events stay in the journal")


@pytest.mark.parametrize("pieces", NEVER_WHOLE.values(), ids=NEVER_WHOLE)
def test_every_request_of_mlflow_is_limited(pieces: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and uploads: both go through the session that raylign puts in MLflow's place."""
    uploading: Any = HttpArtifactRepository  # has no types
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    (tmp_path / "file").write_text("x" * 1000)
    with sending(pieces) as uri:
        with pytest.raises(TrackingError, match="no whole answer in time"):
            MlflowStore(uri).params("0" * 32)
        repository = uploading(f"{uri}/api/2.0/mlflow-artifacts/artifacts/1")
        with transport.limited(), pytest.raises(Exception, match="no whole answer in time"):
            repository.log_artifact(str(tmp_path / "file"))


def test_only_raylign_s_own_requests_are_limited() -> None:
    options = (0, 2, 1.0, frozenset[int](), True, True)
    session: Any = request_utils._get_request_session  # has no types
    with transport.limited():
        assert isinstance(session(*options).get_adapter("http://h"), LIMITED)
    other = session(*options)
    assert isinstance(other, requests.Session) and not isinstance(other.get_adapter("http://h"), LIMITED)
