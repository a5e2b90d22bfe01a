"""A scoring function can neither forge a score, nor block past its deadline, nor leave a process behind."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem
from raylign.scoring.function import FunctionScorer
from raylign.scoring.process import START_TIMEOUT_S, Location, NoAnswer, ScoringProcess, read_answers, read_location
from raylign.scoring.relay import NO_CODE, Frames, TooLarge, frame
from tests.faults import record
from tests.mlflow_servers import wait_until
from tests.processes import alive

Make = Callable[..., FunctionScorer]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    scorers: list[FunctionScorer] = []

    def _make(function: str, batch_size: int = 1, timeout_s: float = START_TIMEOUT_S) -> FunctionScorer:
        block = FunctionScoringBlock(
            function=f"hostile_scores:{function}", batch_size=batch_size, timeout_s=timeout_s, max_unscored=1.0
        )
        scorers.append(FunctionScorer(block))
        return scorers[-1]

    yield _make
    for scorer in scorers:
        scorer.close()


def items(folder: Path, *completions: str) -> list[ScoringItem]:
    prompt = Prompt("p", ({"role": "user", "content": str(folder)},), (1,))
    return [ScoringItem(prompt, completion) for completion in completions]


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def noted(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().splitlines()]


@pytest.mark.fault
def test_a_forked_copy_that_returns_from_the_function_answers_nothing(make: Make, tmp_path: Path) -> None:
    scorer = make("forking")
    assert values(scorer.score(items(tmp_path, "fork"))) == [1.0]
    wait_until(lambda: (tmp_path / "pids").exists() and noted(tmp_path) != [])
    (copy,) = noted(tmp_path)
    wait_until(lambda: not alive(copy))
    assert values(scorer.score(items(tmp_path, "a", "b", "c"))) == [1.0] * 3
    record("a scoring function that forks", "its copy returns 999 too", lost="nothing: the copy's answer is no one's")


@pytest.mark.fault
def test_what_is_written_into_the_descriptors_scores_nothing(make: Make, tmp_path: Path) -> None:
    assert values(make("forging").score(items(tmp_path, *"abcde"))) == [1.0] * 5
    record("a scoring function that forges", "answers of 999 written into its descriptors", lost="nothing: dropped")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("function", "seconds", "reason"),
    [
        ("promising", 0.5, "no answer within 0.5 s"),
        ("boasting", START_TIMEOUT_S, "wrote an answer of more than 16 MiB"),
        ("closing", START_TIMEOUT_S, "the scoring process closed its channel"),
    ],
)
def test_half_an_answer_blocks_nothing(
    function: str, seconds: float, reason: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, ask = make(function, timeout_s=seconds), ScoringProcess.ask

    def patient(self: ScoringProcess, request: dict[str, list[list[str]]], timeout_s: float) -> object:
        return ask(self, request, timeout_s if "bad" in request["arguments"][1] else START_TIMEOUT_S)

    monkeypatch.setattr(ScoringProcess, "ask", patient)
    assert scorer.score(items(tmp_path, "a", "bad", "b")) == [Score(1.0), Score(None, reason=reason), Score(1.0)]
    record("a scoring function that blocks", f"{function}: part of an answer", lost="its item stays unscored")


@pytest.mark.fault
@pytest.mark.parametrize("completion", ["answer", "late", "exit", "kill the relay", "stop the relay"])
def test_no_daemon_outlives_its_scorer(
    completion: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = ScoringProcess._receive

    def once_started(self: ScoringProcess, timeout_s: float) -> bytes:
        wait_until(lambda: (tmp_path / "pids").exists() and noted(tmp_path) != [])
        return receive(self, timeout_s)

    scorer = make("daemonising", timeout_s=START_TIMEOUT_S if completion in ("answer", "exit") else 0.5)
    monkeypatch.setattr(ScoringProcess, "_receive", once_started)
    monkeypatch.setattr("raylign.scoring.process.EXIT_GRACE_S", 2.0)
    (score,) = scorer.score(items(tmp_path, completion))
    expected = {
        "answer": Score(1.0),
        "exit": Score(None, reason="the scoring process exited with code 3"),
        "kill the relay": Score(None, reason="the process that watches over the scoring process has ended"),
    }
    assert score == expected.get(completion, Score(None, reason="no answer within 0.5 s"))
    scorer.close()
    (daemon,) = noted(tmp_path)
    assert not alive(daemon)
    record("a scoring function that leaves a daemon", completion, lost="nothing: it ends with its scorer")


def test_what_multiplies_faster_than_it_is_killed_ends_too(make: Make, tmp_path: Path) -> None:
    scorer = make("multiplying")
    assert values(scorer.score(items(tmp_path, "a"))) == [1.0]
    scorer.close()
    assert not any(alive(pid) for pid in noted(tmp_path))


GIVEN = [1.0, "", {"length": 2.0}, True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"answers": 7}',
        b'{"answers": [[1, "", {}]]}',
        b'{"answers": [["1", "", {}, true]]}',
        b'{"answers": [[true, "", {}, true]]}',
        b'{"answers": [[NaN, "", {}, true]]}',
        b'{"answers": [[1e999, "", {}, true]]}',
        b'{"answers": [[1, null, {}, true]]}',
        b'{"answers": [[1, "", {"a": "b"}, true]]}',
        b'{"answers": [[1, "", [], true]]}',
        b'{"answers": [[1, "", {}, 1]]}',
        b'{"answers": ' + b"[" * 100_000,
        b'{"answers": [[1' + b"0" * 10_000 + b', "", {}, true]]}',
        b'{"failure": 7}',
        b'{"file": 7, "line": 1}',
        b'{"file": "a", "line": true}',
        b'{"file": "a", "line": "1"}',
    ],
)
def test_what_a_scoring_process_never_sends_is_no_answer(content: bytes) -> None:
    for read in (read_answers, read_location):
        with pytest.raises(NoAnswer, match="answered no ") as caught:
            read(content)
        assert isinstance(caught.value, ScorerError) and len(str(caught.value)) < 400


def test_what_a_scoring_process_sends_is_read() -> None:
    (given,) = read_answers(json.dumps({"answers": [GIVEN]}).encode())
    assert (given.value, given.reason, given.parts, given.final) == (1.0, "", {"length": 2.0}, True)
    (given,) = read_answers(json.dumps({"answers": [[None, "\x1b[2J" + "y" * 1000, {"a": math.nan}, False]]}).encode())
    assert given.value is None and given.reason.startswith("\\x1b[2J") and len(given.reason) == 300
    assert read_location(b'{"file": "", "line": 1}') == Location(file="", line=1)
    for read in (read_answers, read_location):
        with pytest.raises(NoAnswer, match=r"^no \\x1b$"):
            read(b'{"failure": "no\\n\\u001b"}')


def test_frames_come_whole_in_whatever_pieces() -> None:
    sent = [(bytes([number]) * 16, b"x" * number) for number in range(5)]
    stream = b"".join(frame(code, content) for code, content in sent)
    for size in (1, 7, len(stream)):
        frames, found = Frames(100), []
        for start in range(0, len(stream), size):
            frames.add(stream[start : start + size])
            while whole := frames.take():
                found.append(whole)
        assert found == sent
    frames = Frames(100)
    frames.add(struct.pack(">I", 101) + NO_CODE)
    with pytest.raises(TooLarge):
        frames.take()
