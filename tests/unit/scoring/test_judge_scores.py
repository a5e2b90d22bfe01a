"""Scores from a judge: comparisons, ratings, what is asked, what it costs."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.scorer.actor import ScorerWorker
from raylign.config import parse_config
from raylign.config.scoring import JudgeScoringBlock, VerifierScoringBlock
from raylign.errors import ConfigError, ScorerError
from raylign.records import Score
from raylign.scoring.judge import JudgeScorer, questions
from raylign.scoring.kind import batches as split
from raylign.scoring.kind import longest_s
from raylign.scoring.load import describe_scorer
from tests.judges import Asked, Judged, Reply, first_is_best, group, honest, slow, values

SECRET = "hush-1234-hush"


def test_a_score_is_the_mean_share_of_wins_worked_out_by_hand(judged: Judged) -> None:
    scorer, _ = judged(honest)
    scores = scorer.score(group("good good good", "good", "good end"))
    # The first beats both; the other two tie: (1 + 1) / 2, (0 + 1/2) / 2, (0 + 1/2) / 2.
    assert values(scores) == [1.0, 0.25, 0.25]
    assert scores[1].parts == {"comparisons": 2.0, "disagreements": 0.0, "missing": 0.0}


def test_items_of_one_prompt_that_stand_together_are_a_group(judged: Judged) -> None:
    scorer, server = judged(honest)
    items = [*group("good", "", prompt="p0"), *group("good good", prompt="p1"), *group("", "good", prompt="p2")]
    assert values(scorer.score(items)) == [1.0, 0.0, 2 / 9, 0.0, 1.0]
    compared = {(a.data("answer A"), a.data("answer B")) for a in server.asked[1:] if not a.is_rating}
    assert compared == {("good", ""), ("", "good")}
    conversations = {a.data("conversation") for a in server.asked[1:]}
    assert conversations == {f"user:\nWrite about p{i}." for i in range(3)}


def test_a_single_answer_is_rated_from_1_to_10(judged: Judged) -> None:
    scorer, _ = judged(honest)
    items = [item for i, count in enumerate((0, 3, 9, 20)) for item in group("good " * count, prompt=f"p{i}")]
    scores = scorer.score(items)
    assert values(scores) == [0.0, 3 / 9, 1.0, 1.0]
    assert [score.parts for score in scores] == [{"rating": rating} for rating in (1.0, 4.0, 10.0, 10.0)]


def test_a_judge_who_prefers_a_position_decides_nothing(judged: Judged) -> None:
    scorer, _ = judged(first_is_best)
    scores = scorer.score(group("good good", "good", ""))
    assert values(scores) == [0.5, 0.5, 0.5]
    assert [score.parts["disagreements"] for score in scores] == [2.0, 2.0, 2.0]
    assert (scorer.spent.comparisons, scorer.spent.disagreements) == (3, 3)


def test_equal_answers_tie_without_being_asked(judged: Judged) -> None:
    scorer, server = judged(honest)
    assert values(scorer.score(group("good", "bad", "good"))) == [0.75, 0.0, 0.75]
    assert len(server.asked) == 1 + 2
    assert values(scorer.score(group("same", "same"))) == [0.5, 0.5]
    assert len(server.asked) == 3


def test_a_comparison_without_both_verdicts_is_missing(judged: Judged) -> None:
    def silent_about_bad(asked: Asked) -> Reply:
        bad = not asked.is_rating and asked.data("answer A") == "bad"
        return Reply(status=400, raw="too long") if bad else honest(asked)

    scorer, _ = judged(silent_about_bad)
    scores = scorer.score(group("good good", "good", "bad"))
    assert values(scores) == [1.0, 0.0, None]
    assert scores[0].parts == {"comparisons": 1.0, "disagreements": 0.0, "missing": 1.0}
    assert scores[2] == Score(None, reason="HTTP 400: too long")


def test_the_only_answers_are_the_choices_and_the_instruction_comes_last(judged: Judged) -> None:
    scorer, server = judged(honest, criterion="The ruder answer is better.", temperature=0.5)
    scorer.score([*group("good", "bad"), *group("x", prompt="p1")])
    comparison = next(asked for asked in server.asked[1:] if not asked.is_rating)
    rating = next(asked for asked in server.asked if asked.is_rating)
    assert comparison.body["structured_outputs"] == {"choice": ["A", "B", "tie"]}
    assert rating.body["structured_outputs"] == {"choice": [str(n) for n in range(1, 11)]}
    assert comparison.body["temperature"] == 0.5 and comparison.body["max_tokens"] <= 8
    for asked in (comparison, rating):
        assert "The ruder answer is better." in asked.system
        last = asked.user.rpartition(asked.fence)[2]
        assert "The ruder answer is better." in last and "Reply with exactly one of these" in last


def test_every_question_has_a_fence_of_its_own(judged: Judged) -> None:
    scorer, server = judged(honest)
    scorer.score(group("a", "b", "c"))
    assert len({asked.fence for asked in server.asked}) == len(server.asked) == 7


def test_a_server_that_takes_no_choices_is_asked_plainly(judged: Judged) -> None:
    def plain(asked: Asked) -> Reply:
        unknown = "structured_outputs" in asked.body
        return Reply(status=400, raw="Unrecognized request argument") if unknown else honest(asked)

    scorer, server = judged(plain, concurrency=1)
    assert values(scorer.score(group("good", "bad", ""))) == [1.0, 0.25, 0.25]
    constrained = ["structured_outputs" in asked.body for asked in server.asked]
    assert constrained == [True] + [False] * 7
    assert scorer.spent.failures == 0


def test_no_more_requests_than_allowed_are_under_way(judged: Judged) -> None:
    lock, now, most, met, three = threading.Lock(), [0], [0], threading.Event(), threading.Event()

    def counting(asked: Asked) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                three.set()
        if met.is_set():
            three.wait()
        met.set()  # the first question is asked alone
        reply = slow(honest, 0.02)(asked)
        with lock:
            now[0] -= 1
        return reply

    scorer, _ = judged(counting, concurrency=3)
    scorer.score(group(*(f"good {i}" for i in range(5))))
    assert most == [3]


def test_the_cost_is_logged_once_a_call(judged: Judged, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="raylign")
    scorer, _ = judged(honest)
    scorer.score(group("good", "bad"))
    scorer.score(group("good", "bad", "good good"))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("raylign")]
    assert lines == [
        "judge judge-1: 3 requests, 0 of them without a verdict; 1 comparisons, 0 of them disagreed; "
        "30 tokens (0 answers without usage)",
        "judge judge-1: 6 requests, 0 of them without a verdict; 3 comparisons, 0 of them disagreed; "
        "60 tokens (0 answers without usage)",
    ]
    assert (scorer.spent.requests, scorer.spent.tokens) == (9, 90)


@pytest.mark.parametrize("usage", [None, "ten", {"total_tokens": "10"}, {"total_tokens": -1}, {}, [1]])
def test_wrong_usage_costs_no_verdict(judged: Judged, usage: Any) -> None:
    scorer, _ = judged(lambda asked: Reply(honest(asked).content, usage=usage))
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]
    assert (scorer.spent.tokens, scorer.spent.unmetered) == (0, 3)


def test_no_items_give_no_scores_and_no_requests(judged: Judged) -> None:
    scorer, server = judged(honest)
    assert scorer.score([]) == [] and server.asked == []


def test_the_key_goes_into_the_header_and_nowhere_else(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    scorer, server = judged(lambda asked: Reply(status=400, raw=f"{SECRET} is bad"), api_key_env="JUDGE_KEY", retries=0)
    with pytest.raises(ScorerError) as caught:
        scorer.score(group("good", "bad"))
    assert {asked.authorization for asked in server.asked} == {f"Bearer {SECRET}"}
    assert "HTTP 400: [redacted] is bad" in str(caught.value)
    assert SECRET not in f"{caught.value}{caplog.text}{[asked.body for asked in server.asked]}"


def test_without_its_variable_no_key_is_sent(judged: Judged) -> None:
    scorer, server = judged(honest)
    scorer.score(group("good", "bad"))
    assert {asked.authorization for asked in server.asked} == {""}
    assert "OPENAI_API_KEY" not in os.environ


def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    with pytest.raises(ScorerError, match="OPENAI_API_KEY holds whitespace") as caught:
        JudgeScorer(JudgeScoringBlock(base_url="http://127.0.0.1:1/v1", model="m"))
    assert SECRET not in str(caught.value)


def test_a_judge_is_described_by_model_address_and_criterion(judged: Judged) -> None:
    _, server = judged(lambda asked: Reply("certainly!"))
    block = JudgeScoringBlock(base_url=server.base_url, model="judge-1", criterion="Shorter is better.", retries=0)
    assert describe_scorer(block) == ("judge judge-1", f"at {server.base_url}", "criterion: Shorter is better.")
    assert len(server.asked) == 1


def test_the_actor_takes_the_scorer_that_the_block_names(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    block = JudgeScoringBlock(base_url=server.base_url, model="judge-1", canaries=False)
    actor = ScorerWorker(block, str(tmp_path / "scores.sqlite"), str(tmp_path), "scorer-0")
    assert actor.ready() and values(actor.score(group("good", "bad"), 0).scores) == [1.0, 0.0]


def test_the_actor_has_the_gold_scorer_beside_it(judged: Judged, tmp_path: Path) -> None:
    """Each judges by itself and keeps its own scores, in one file."""
    _, server = judged(honest)
    block = JudgeScoringBlock(base_url=server.base_url, model="judge-1", canaries=False)
    gold = VerifierScoringBlock(method="regex", pattern="bad")
    cache, stacks = str(tmp_path / "scores.sqlite"), str(tmp_path)
    actor = ScorerWorker(block, cache, stacks, "scorer-0", gold=gold)
    for _ in range(2):
        assert values(actor.score(group("good", "bad"), 0).scores) == [1.0, 0.0]
        assert values(actor.gold(group("good", "bad"), 0).scores) == [0.0, 1.0]
    asked = len(server.asked)
    again = ScorerWorker(block, cache, stacks, "scorer-0", gold=gold)
    found = again.gold(group("good", "bad"), 0)
    assert found.usage["verifier"].cache_hits == 2 and len(server.asked) == asked
    with pytest.raises(ScorerError, match="this run has no gold scorer; set evaluation.gold"):
        ScorerWorker(block, cache, stacks, "scorer-0").gold(group("good"), 0)


def test_batches_keep_the_answers_of_a_prompt_together() -> None:
    items = [item for i, count in enumerate((2, 2, 5, 1, 2, 1)) for item in group(*"abcde"[:count], prompt=f"p{i}")]
    block = JudgeScoringBlock(base_url="http://h/v1", model="m", batch_size=4)
    found = split(items, block)
    assert [len(batch) for batch in found] == [4, 5, 4]
    assert [item for batch in found for item in batch] == items
    assert split([], block) == []


def test_the_deadline_of_a_batch_comes_from_its_questions() -> None:
    items = [*group("a", "b", "c"), *group("a", prompt="p1")]
    assert questions(items) == 3 * 2 + 1
    block = JudgeScoringBlock(base_url="http://h/v1", model="m", timeout_s=10, retries=1, concurrency=4)
    # 7 questions and 9 at the start, 4 at once; each 10 s, a wait of 10 s as the server asks and 8.5 s, 10 s again.
    assert longest_s(items, block) == 4 * (10 + 10 + 8.5 + 10)


def refusal(*overrides: str) -> str:
    settings = ("scoring.type=judge", "scoring.base_url=http://judge:8000/v1", "scoring.model=m", *overrides)
    with pytest.raises(ConfigError) as caught:
        parse_config({}, settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@judge/v1",
        f"https://{SECRET}@judge/v1",
        f"https://judge/v1?api_key={SECRET}",
        f"http://j/#{SECRET}",
    ],
)
def test_addresses_with_credentials_are_refused_without_naming_them(url: str) -> None:
    text = refusal(f"scoring.base_url='{url}'")
    assert "end it at /v1 and put the key in the environment variable" in text and SECRET not in text


@pytest.mark.parametrize("url", ["ftp://judge/v1", "judge:8000", "http://", "http://judge:99999/v1", "http://a b", ""])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    assert "is not http(s)://host[:port]/path" in refusal(f"scoring.base_url='{url}'")


@pytest.mark.parametrize("name", ["sk-hush-1234", "hush1234", "", "1KEY", "A B"])
def test_a_key_in_place_of_its_variable_is_refused_without_showing_it(name: str) -> None:
    text = refusal(f"scoring.api_key_env='{name}'")
    assert "not the name of an environment variable" in text and "hush" not in text


def test_held_out_completions_are_not_compared_with_each_other() -> None:
    assert "set evaluation.num_generations=1" in refusal("evaluation.num_generations=2")


def test_the_config_has_the_name_of_the_key_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    block = parse_config({}, ["scoring={type: judge, base_url: 'https://judge/v1', model: m}"]).scoring
    assert SECRET not in block.model_dump_json() and SECRET not in repr(block)
