"""Judges that fail: away, refusing, late, overloaded, talking nonsense, unfit."""

import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from raylign.config.scoring import JudgeScoringBlock
from raylign.errors import ScorerError
from raylign.records import Score
from raylign.scoring.base import check_unscored
from raylign.scoring.judge import JudgeScorer
from raylign.scoring.judge_client import QUESTIONS
from raylign.scoring.load import describe_scorer
from tests.faults import record
from tests.judges import Asked, Judge, Judged, Reply, Server, first_is_best, group, honest, values


def after(requests: int, then: Judge, first: Judge = honest) -> Judge:
    """`first` for so many requests, then another judge."""
    lock, count = threading.Lock(), [0]

    def answer(asked: Asked) -> Reply:
        with lock:
            count[0] += 1
            late = count[0] > requests
        return (then if late else first)(asked)

    return answer


def saying(content: str | None) -> Judge:
    return lambda asked: Reply(content)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def refusal(scorer: JudgeScorer) -> str:
    with pytest.raises(ScorerError) as caught:
        scorer.score(group("good", "bad"))
    return str(caught.value)


@pytest.mark.fault
def test_a_server_that_is_away_is_named_before_anything_is_scored(judged: Judged) -> None:
    block = JudgeScoringBlock(base_url=f"http://127.0.0.1:{closed_port()}/v1", model="judge-1", retries=1)
    started = time.monotonic()
    with pytest.raises(ScorerError) as caught:
        describe_scorer(block)
    seconds = time.monotonic() - started
    text = str(caught.value)
    assert text.startswith(f"the judge judge-1 at {block.base_url}: cannot be reached (ConnectError: ")
    assert text.endswith("start the server, or correct scoring.base_url")
    assert refusal(JudgeScorer(block)) == text

    scorer, _ = judged(after(1, lambda asked: Reply(status=503, raw="starting")))
    scores = scorer.score(group("good", "bad"))
    assert scores == [Score(None, reason="HTTP 503: starting")] * 2
    with pytest.raises(ScorerError, match="2 x HTTP 503: starting"):
        check_unscored(scores, 0.2)
    record(
        "judge server away",
        "nothing listens at scoring.base_url; a server that answers 503 in the middle",
        detected_s=seconds,
        lost="no start; in the middle of a run the candidates stay unscored, with the reason",
    )


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Reply(status=401, raw="x"),
            "HTTP 401: no key was sent; put the right one into OPENAI_API_KEY",
        ),
        (Reply(status=403, raw="x"), "HTTP 403: no key was sent"),
        (
            Reply(status=404, raw="no model judge-1"),
            "HTTP 404: no model judge-1; check scoring.model=judge-1",
        ),
        (Reply(status=400, raw="\x1b[31m odd\nrequest"), r"HTTP 400: \x1b[31m odd request"),
        (Reply(status=302, headers={"Location": "http://other/"}), "HTTP 302: "),
        (Reply(raw="<html>hello</html>"), "answered with no chat completion: <html>hello</html>"),
        (Reply(raw='{"choices": []}'), "answered with no chat completion: "),
        (Reply(raw='{"choices": [{"message": {"content": 7}}]}'), "answered with no chat completion: "),
    ],
)
def test_what_the_first_question_meets_is_told(judged: Judged, reply: Reply, message: str) -> None:
    for canaries in (True, False):
        scorer, server = judged(lambda asked: reply, canaries=canaries)
        text = refusal(scorer)
        assert text.startswith(f"the judge judge-1 at {server.base_url}: {message}")


def test_a_refused_key_is_not_tried_again(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hush-1234")
    scorer, server = judged(lambda asked: Reply(status=401, raw="hush-1234"), retries=5)
    text = refusal(scorer)
    assert "the key is refused" in text and "hush" not in text
    assert len(server.asked) == 1


def test_failures_that_pass_are_tried_again(judged: Judged) -> None:
    def stumbling() -> Judge:
        seen: dict[str, int] = {}
        lock = threading.Lock()
        failures = (Reply(status=500), Reply("hmm"))

        def answer(asked: Asked) -> Reply:
            pair = asked.user.replace(asked.fence, "")
            with lock:
                seen[pair] = seen.get(pair, 0) + 1
            return failures[seen[pair] - 1] if seen[pair] <= len(failures) else honest(asked)

        return answer

    scorer, _ = judged(stumbling())
    assert values(scorer.score(group("good good", "good", ""))) == [1.0, 0.5, 0.0]
    assert (scorer.spent.requests, scorer.spent.failures) == (3 + 18, 2 + 12)


def test_retry_after_is_waited_for(judged: Judged) -> None:
    times: list[float] = []

    def busy(asked: Asked) -> Reply:
        times.append(time.monotonic())
        if len(times) == 2:
            return Reply(status=429, headers={"Retry-After": "1"}, raw="slow down")
        return honest(asked)

    scorer, _ = judged(busy)
    assert values(scorer.score(group("good"))) == [1 / 9]
    assert times[2] - times[1] >= 1.0


def test_retry_after_may_be_a_date(judged: Judged) -> None:
    asked_at: list[datetime] = []
    until: list[datetime] = []

    def busy(asked: Asked) -> Reply:
        asked_at.append(datetime.now(UTC))
        then = datetime.now(UTC) + timedelta(seconds=2)
        until.append(then.replace(microsecond=0))
        return Reply(status=429, headers={"Retry-After": format_datetime(then, usegmt=True)})

    scorer, _ = judged(after(1, busy), retries=1)
    assert values(scorer.score(group("good"))) == [None]
    assert asked_at[1] >= until[0]


def test_a_wait_beyond_the_deadline_is_not_waited_for(judged: Judged) -> None:
    busy = Reply(status=429, headers={"Retry-After": "3600"}, raw="slow down")
    scorer, server = judged(after(1, lambda asked: busy))
    scores = scorer.score(group("good"))
    assert scores[0].reason == "HTTP 429: slow down; asks to wait 3600 s, scoring.timeout_s=60"
    assert len(server.asked) == 2


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_request_ends_at_its_deadline(judged: Judged, drip: bool) -> None:
    """Also when bytes come all the time."""
    held: list[Server] = []

    def hanging(asked: Asked) -> Reply:
        held[0].released.wait()
        return honest(asked)

    scorer, server = judged(
        after(1, (lambda asked: Reply(raw="x" * 400, drip_s=0.05)) if drip else hanging),
        timeout_s=1.0,
        retries=1,
    )
    held.append(server)
    started = time.monotonic()
    scores = scorer.score(group("good", "bad"))
    assert time.monotonic() - started >= 2.0
    assert [score.reason for score in scores] == [
        "no answer within 1 s; see to the server, or raise scoring.timeout_s"
    ] * 2


@pytest.mark.fault
def test_nonsense_is_no_verdict(judged: Judged) -> None:
    nonsense = ("", "A or B", "a", "Answer A", "**A**", "1", '{"verdict": "A"}', "TIE", "A" * 5000, "\x1b[2JA", None)
    for content in nonsense:
        scorer, server = judged(after(1, saying(content)), retries=1)
        scores = scorer.score([*group("good", "bad"), *group("good", prompt="p1")])
        assert values(scores)[:2] == [None, None], content
        assert values(scores)[2] == (0.0 if content == "1" else None), content
        assert scores[0].reason.startswith("answered ") and len(scores[0].reason) < 300
        assert scores[0].reason.endswith(", none of A, B, tie") and "\x1b" not in scores[0].reason
        assert len(server.asked) == 1 + 2 * 2 + (1 if content == "1" else 2)

    scorer, server = judged(saying("Sure! I would say A."), retries=0, canaries=True)
    text = refusal(scorer)
    assert f"the judge judge-1 at {server.base_url} cannot judge: 4 of 4 questions" in text
    assert "answered 'Sure! I would say A.', none of A, B, tie" in text and "scoring.canaries=false" in text
    assert len(server.asked) == 1 + 2 * len(QUESTIONS), "nothing was scored"
    record(
        "judge that answers nonsense",
        f"{len(nonsense)} kinds of answers that are no choice, and a judge who chats",
        lost="the candidates stay unscored, with the answer; with canaries the run does not start to score",
    )


def test_spaces_around_a_choice_are_no_nonsense(judged: Judged) -> None:
    scorer, _ = judged(lambda asked: Reply(f" {honest(asked).content}\n"))
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("unfit", "shown"),
    [
        (first_is_best, "-> A; the other way round -> A"),
        (lambda asked: Reply("tie"), "-> tie; the other way round -> tie"),
        (lambda asked: Reply({"A": "B", "B": "A"}[str(honest(asked).content)]), "-> B; the other way round -> A"),
    ],
    ids=["by position", "undecided", "contrary"],
)
def test_an_unfit_judge_is_refused_before_anything_is_scored(judged: Judged, unfit: Judge, shown: str) -> None:
    scorer, server = judged(unfit, canaries=True)
    text = refusal(scorer)
    assert "4 of 4 questions with known answers went wrong" in text and text.count(shown) == 4
    assert all(canary.question in text for canary in QUESTIONS)
    assert len(server.asked) == 1 + 2 * len(QUESTIONS)


def test_a_sound_judge_is_met_once(judged: Judged) -> None:
    scorer, server = judged(honest, canaries=True)
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]
    assert len(server.asked) == 1 + 2 * len(QUESTIONS) + 2 + 2


def test_one_wrong_canary_is_forgiven(judged: Judged) -> None:
    def fond_of_fish(asked: Asked) -> Reply:
        return Reply("tie") if "fish" in asked.user else honest(asked)

    scorer, _ = judged(fond_of_fish, canaries=True)
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]


def test_nothing_is_asked_once_too_many_are_unscored(judged: Judged) -> None:
    scorer, server = judged(after(1, lambda asked: Reply(status=400, raw="no")), max_unscored=0.2, concurrency=1)
    scores = scorer.score([item for i in range(10) for item in group("good", "bad", prompt=f"p{i}")])
    assert values(scores) == [None] * 20
    assert [score.reason for score in scores[:6]] == ["HTTP 400: no"] * 6
    assert scores[-1].reason == "skipped: more than 20% of items already unscored"
    assert len(server.asked) < 1 + 2 * 2 * 6


def test_the_whole_may_lose_what_the_caller_says(judged: Judged) -> None:
    def picky(asked: Asked) -> Reply:
        return Reply(status=400, raw="no") if "bad" in asked.data("answer") else honest(asked)

    def answer(asked: Asked) -> Reply:
        return picky(asked) if asked.is_rating else honest(asked)

    items = [item for i, text in enumerate(("bad", "bad", "good", "good")) for item in group(text, prompt=f"p{i}")]
    scorer, _ = judged(answer, concurrency=1)
    assert values(scorer.score(items, allowed=2)) == [None, None, 1 / 9, 1 / 9]
    assert values(scorer.score(items, allowed=0)) == [None, None, None, None]
