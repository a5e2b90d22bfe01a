"""Answers of servers: whatever comes, there is one score an item, or one thing that MLflow misses."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

from mlflow.entities import Metric, Param, RunTag

from raylign.config.scoring import HttpScoringBlock, JudgeScoringBlock
from raylign.errors import TrackingError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem
from raylign.scoring.http_service import HttpScorer
from raylign.scoring.judge import JudgeScorer
from raylign.tracking.mlflow_store import MlflowStore
from tests.hostile_servers import sending

ITEM = ScoringItem(Prompt("p", ({"role": "user", "content": "Why?"},), (1,)), "So.")
LONGEST = 500
SCORES = b'{"scores": [0.5], "reasons": ["good"]}'
VERDICT = (
    b'{"choices": [{"message": {"role": "assistant", "content": "7"}}], "usage": {"total_tokens": 9, '
    b'"prompt_tokens": 8, "completion_tokens": 1}}'
)
REASONED = {"reason": "It is short.", "rating": "7"}


def saying(content: bytes) -> bytes:
    """A chat completion with this content."""
    return VERDICT.replace(b'"7"', json.dumps(content.decode()).encode())


_RUN = {
    "info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active", "start_time": 1},
    "data": {"params": [{"key": "a", "value": "b"}], "tags": [{"key": "c", "value": "d"}], "metrics": []},
}
MLFLOW = json.dumps(
    {
        "experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active", "artifact_location": "x:/"},
        "experiment_id": "1",
        "run": _RUN,
        "runs": [_RUN],
        "run_info": _RUN["info"],
    }
).encode()
"""What each of the questions is answered by."""


def answers(*bodies: bytes) -> list[bytes]:
    """Whole HTTP answers with these bodies."""
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n%s"
    found = [head % (b"200 OK", len(body), b"", body) for body in bodies]
    found.append(head % (b"429 Too Many Requests", 2, b"Retry-After: 1\r\n", b"{}"))
    found.append(head % (b"200 OK", len(bodies[0]), b"Content-Encoding: gzip\r\n", bodies[0]))
    found.append(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    return found


WORDS = (b"Content-Encoding: br\r\n", b"Transfer-Encoding: chunked\r\n", b"Retry-After: 999999999\r\n", b"HTTP/1.1 ")


class _Server:
    """One server for all inputs: it sends `data` to whoever asks, and hangs up."""

    def __init__(self) -> None:
        self.data = b""
        self._open = ExitStack()
        self.url = self._open.enter_context(sending(lambda: [self.data]))


@cache
def server() -> _Server:
    return _Server()


def service(protocol: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        server().data = data
        url = f"{server().url}/score"
        block = HttpScoringBlock.model_validate(
            {"url": url, "protocol": protocol, "retries": 0, "timeout_s": 5.0, "max_unscored": 1.0}
        )
        (score,) = HttpScorer(block).score([ITEM])
        assert score.value is not None or score.reason

    return read


def judge(data: bytes) -> None:
    score = _judged(data, reasons=False)
    assert (score.value is None) == bool(score.reason)


def reasoning_judge(data: bytes) -> None:
    score = _judged(data, reasons=True)
    assert score.reason.isprintable() and 0 < len(score.reason) <= LONGEST


def _judged(data: bytes, *, reasons: bool) -> Score:
    server().data = data
    block = JudgeScoringBlock.model_validate(
        {
            "base_url": f"{server().url}/v1",
            "model": "m",
            "canaries": False,
            "reasons": reasons,
            "retries": 0,
            "timeout_s": 5.0,
            "max_unscored": 1.0,
        }
    )
    (score,) = JudgeScorer(block).score([ITEM])
    return score


def mlflow(data: bytes) -> None:
    """Every question raises TrackingError or gets what it asks for."""
    server().data = data
    store, missed = MlflowStore(server().url), 0
    questions: list[Callable[[], object]] = [
        lambda: store.experiment("e"),
        lambda: store.has("r"),
        lambda: store.find_run("1", {"a": "b"}),
        lambda: store.create_run("1", 1, {"a": "b"}, "name"),
        lambda: store.params("r"),
        lambda: store.set_running("r"),
        lambda: store.set_ended("r", "FINISHED", 2),
        lambda: store.log_metrics("r", [Metric("m", 1.0, 1, 1)]),
        lambda: store.log_params("r", [Param("p", "v")]),
        lambda: store.log_tags("r", [RunTag("t", "v")]),
    ]
    for ask in questions:
        try:
            ask()
        except TrackingError as error:
            assert len(str(error)) < LONGEST and str(error).isprintable(), str(error)
            missed += 1
    if missed:
        raise TrackingError(f"MLflow misses {missed} of {len(questions)}; see the log")
