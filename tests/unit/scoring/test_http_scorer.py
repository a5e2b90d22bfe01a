"""Scores from a reward service: what is sent, what is read, and services that fail."""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.config.scoring import HttpScoringBlock
from raylign.errors import ConfigError, ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem
from raylign.scoring.http_service import HttpScorer
from raylign.scoring.kind import batches, longest_s
from raylign.scoring.load import describe_scorer
from tests.faults import record
from tests.loopback import Posted
from tests.reward_services import Answer, Running, Service, running

SECRET = "hush-1234-hush"
Make = Callable[..., tuple[HttpScorer, Running]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Scorers over services of this process, without long waits."""
    for name, seconds in (("FIRST_WAIT_S", 0.01), ("LONGEST_WAIT_S", 0.02), ("JITTER_S", 0.01)):
        monkeypatch.setattr(f"raylign.scoring.http_client.{name}", seconds)
    monkeypatch.delenv("REWARD_API_KEY", raising=False)
    with ExitStack() as stack:

        def make(service: Service, **options: Any) -> tuple[HttpScorer, Running]:
            server = stack.enter_context(running(service))
            settings = {"max_unscored": 1.0, "timeout_s": 60.0, "retries": 1} | options
            return HttpScorer(HttpScoringBlock(url=server.url, **settings)), server

        yield make


def items(*completions: str, **meta: Any) -> list[ScoringItem]:
    return [
        ScoringItem(Prompt(f"p{i}", ({"role": "user", "content": f"Question {i}?"},), (1,), meta), completion)
        for i, completion in enumerate(completions)
    ]


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def lengths(posted: Posted) -> Answer:
    return Answer({"scores": [len(completion) for completion in posted.body["completions"]]})


def test_batches_are_sent_and_scores_keep_the_order(served: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_API_KEY", SECRET)
    scorer, server = served(lengths, batch_size=2)
    assert values(scorer.score(items("a", "bbb", "cc", "", "\ud800", answer=7))) == [1.0, 3.0, 2.0, 0.0, 1.0]
    assert len(server.asked) == 3 and {posted.authorization for posted in server.asked} == {f"Bearer {SECRET}"}
    first = next(posted.body for posted in server.asked if posted.body["completions"][0] == "a")
    assert first == {
        "prompts": [[{"role": "user", "content": f"Question {i}?"}] for i in range(2)],
        "completions": ["a", "bbb"],
        "labels": [7, 7],
    }
    assert scorer.amounts() == {"requests": 3, "failed_requests": 0}


def test_the_protocol_of_openrlhf(served: Make, tmp_path: Path) -> None:
    scorer, server = served(lambda posted: Answer({"rewards": [[1.5], 2]}), protocol="openrlhf")
    assert values(scorer.score(items("yes", "no"))) == [1.5, 2.0]
    assert server.asked[0].body == {
        "query": ["Question 0?\n\nyes", "Question 1?\n\nno"],
        "prompts": ["Question 0?\n\n", "Question 1?\n\n"],
        "labels": [None, None],
    }
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    scorer, server = served(lambda posted: Answer({"rewards": [1]}), protocol="openrlhf", chat_template=template)
    scorer.score(items("yes"))
    assert server.asked[0].body["query"] == ["<user>Question 0?<a>yes"]


def test_null_is_unscored_with_the_reason_of_the_service_and_is_not_asked_again(served: Make) -> None:
    answer = Answer({"scores": [1, None, None, 2], "reasons": [None, "no\nidea", None, "short\x1b"]})
    scorer, server = served(lambda posted: answer)
    scores = scorer.score(items("a", "b", "c", "d"))
    assert (scores[0], scores[3]) == (Score(1.0), Score(2.0, reason="short\\x1b"))
    assert scores[1:3] == [
        Score(None, reason="the service gave no score: no idea"),
        Score(None, reason="the service gave no score"),
    ]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"scores": [NaN]}', "answered nan, not a finite number"),
        ('{"scores": [1e999]}', "answered inf, not a finite number"),
        ('{"scores": ["high"]}', "answered 'high', not a finite number"),
        ('{"scores": [true]}', "answered True, not a finite number"),
        ('{"scores": [[1, 2]]}', "answered [1, 2], not a finite number"),
        (f'{{"scores": [1{"0" * 400}]}}', "answered 1000"),
        ('{"scores": []}', "answered with 0 scores and 0 reasons for 1 completions"),
        ('{"scores": [1], "reasons": []}', "answered with 1 scores and 0 reasons for 1 completions"),
        ('{"rewards": [1]}', 'answered with no list of scores: {"rewards": [1]}'),
        ("<html>", "answered with no list of scores: <html>"),
    ],
)
def test_only_the_item_with_a_bad_answer_is_unscored(served: Make, bad: str, reason: str) -> None:
    """The first answer, of the batch, has a score too few or the bad value among the others."""

    def service(posted: Posted) -> Answer:
        completions = posted.body["completions"]
        return Answer(raw=bad) if "bad" in completions else Answer({"scores": [0.5] * len(completions)})

    scorer, _ = served(service, retries=0)
    scores = scorer.score(items("a", "bad", "b"))
    assert values(scores) == [0.5, None, 0.5]
    assert scores[1].reason.startswith(reason)


def test_a_bad_value_among_good_ones_is_asked_again_alone(served: Make) -> None:
    answers = {3: Answer(raw='{"scores": [1, NaN, 3]}'), 1: Answer({"scores": [2]})}
    scorer, server = served(lambda posted: answers[len(posted.body["completions"])])
    assert values(scorer.score(items("a", "b", "c"))) == [1.0, 2.0, 3.0]
    assert [posted.body["completions"] for posted in server.asked] == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_refused_batch_is_asked_item_by_item(served: Make, status: int) -> None:
    def service(posted: Posted) -> Answer:
        return Answer(status=status, raw="too odd") if "bad" in posted.body["completions"] else lengths(posted)

    scorer, _ = served(service)
    scores = scorer.score(items("a", "bad", "bb"))
    assert values(scores) == [1.0, None, 2.0]
    assert scores[1].reason == f"HTTP {status}: too odd"


def test_passing_failures_are_tried_again_and_retry_after_is_waited_for(served: Make) -> None:
    times: list[float] = []

    def service(posted: Posted) -> Answer:
        times.append(time.monotonic())
        return Answer(status=503, headers={"Retry-After": "1"}) if len(times) == 1 else lengths(posted)

    scorer, _ = served(service)
    assert values(scorer.score(items("a", "bb"))) == [1.0, 2.0]
    assert times[1] - times[0] >= 1.0
    assert scorer.amounts() == {"requests": 2, "failed_requests": 1}


@pytest.mark.fault
def test_a_late_service_leaves_its_batch_unscored_without_asking_item_by_item(served: Make) -> None:
    held: list[Running] = []

    def service(posted: Posted) -> Answer:
        held[0].released.wait()
        return lengths(posted)

    scorer, server = served(service, timeout_s=1.0, retries=0)
    held.append(server)
    scores = scorer.score(items("a", "b"))
    assert scores == [Score(None, reason="no answer within 1 s; see to the server, or raise scoring.timeout_s")] * 2
    assert len(server.asked) == 1
    record(
        "reward service hangs",
        "a service that answers after the deadline of 1 s",
        detected_s=1.0,
        lost="its batch stays unscored, with the reason",
    )


def test_a_refused_key_is_told_without_showing_it(served: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_API_KEY", SECRET)
    for status, told in ((401, "the key is refused; put the right one into REWARD_API_KEY"), (418, "not [redacted]")):
        scorer, server = served(lambda posted, status=status: Answer(status=status, raw=f"not {SECRET}"))
        score = scorer.score(items("a"))[0]
        assert told in score.reason and SECRET not in score.reason
        assert len(server.asked) == 1
    monkeypatch.setenv("REWARD_API_KEY", "two words")
    with pytest.raises(ScorerError, match="REWARD_API_KEY holds whitespace"):
        HttpScorer(HttpScoringBlock(url="http://h/"))


def test_nothing_is_asked_once_too_many_are_unscored(served: Make) -> None:
    scorer, server = served(lambda posted: Answer(status=404, raw="no"), batch_size=1, concurrency=1)
    scores = scorer.score(items(*"abcdefgh"), allowed=2)
    assert values(scores) == [None] * 8
    assert scores[2].reason.startswith("HTTP 404: no; check that scoring.url=")
    assert scores[3].reason == "skipped: more than 100% of items already unscored"
    assert len(server.asked) == 3


def test_no_more_requests_than_allowed_are_under_way(served: Make) -> None:
    lock, now, most, together = threading.Lock(), [0], [0], threading.Barrier(3, timeout=300)

    def service(posted: Posted) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()
        time.sleep(0.02)  # for a fourth that should not come
        with lock:
            now[0] -= 1
        return lengths(posted)

    scorer, _ = served(service, batch_size=1, concurrency=3)
    scorer.score(items(*"abcdefghi"))
    assert most == [3]


def test_describe_asks_the_service_once(served: Make) -> None:
    _, server = served(lengths)
    block = HttpScoringBlock(url=server.url)
    assert describe_scorer(block) == ("reward service", f"at {server.url}", "protocol raylign")
    assert len(server.asked) == 1
    _, refusing = served(lambda posted: Answer(status=422, raw="label missing"))
    assert describe_scorer(HttpScoringBlock(url=refusing.url, retries=0))[0] == "reward service"
    _, other = served(lambda posted: Answer({"rewards": [1]}))
    with pytest.raises(ScorerError, match="the reward service at .*: answered with no list of scores"):
        describe_scorer(HttpScoringBlock(url=other.url, retries=0))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(ScorerError, match="cannot be reached .*; start the server, or correct scoring.url"):
        describe_scorer(HttpScoringBlock(url=away, retries=0))


def test_a_call_has_as_many_items_as_keep_the_service_busy() -> None:
    block = HttpScoringBlock(url="http://h/", batch_size=2, concurrency=3, timeout_s=10, retries=1)
    assert [len(batch) for batch in batches(items(*"abcdefgh"), block)] == [6, 2]
    # 3 batches and 6 single items, 3 at once; each 10 s, a wait of 10 s as the server asks and 8.5 s, 10 s again.
    assert math.isclose(longest_s(items(*"abcdef"), block), 3 * (10 + 10 + 8.5 + 10))


def test_a_template_that_fails_names_the_prompt(served: Make, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ raise_exception('no system message') }}")
    scorer, _ = served(lengths, protocol="openrlhf", chat_template=template)
    with pytest.raises(ScorerError, match="fails on prompt p0 .no system message.; correct the template"):
        scorer.score(items("a"))
    with pytest.raises(ScorerError, match="cannot be read .*give a Jinja file"):
        HttpScorer(HttpScoringBlock(url="http://h/", protocol="openrlhf", chat_template=tmp_path / "none.jinja"))
    template.write_text("{{ 'a' * 10 ** 10 }}")
    with pytest.raises(ScorerError, match=r"chat.jinja: the chat template takes more than 512 MiB .*; correct it"):
        HttpScorer(HttpScoringBlock(url="http://h/", protocol="openrlhf", chat_template=template))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"scoring.url=http://me:{SECRET}@h/", "end it at the path and put the key in the environment variable"),
        ("scoring.url=h:80", "is not http(s)://host[:port]/path, for example http://127.0.0.1:5000/get_reward"),
        (f"scoring.api_key_env={SECRET}", "not the name of an environment variable"),
        ("scoring.chat_template=a.jinja", "is for protocol=openrlhf; protocol=raylign sends messages"),
        ("scoring.protocol=openrlhv", "Input should be 'raylign' or 'openrlhf'"),
    ],
)
def test_wrong_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"scoring": {"type": "http", "url": "http://h/"}}, [option])
    assert message in str(caught.value) and SECRET not in str(caught.value)
