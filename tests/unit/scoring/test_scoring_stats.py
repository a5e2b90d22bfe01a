"""What scoring took: counted in the actor, added up by the driver, and sent on as metrics."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from raylign.config.scoring import JudgeScoringBlock
from raylign.errors import ScorerError
from raylign.records import Score
from raylign.scoring.judge import JudgeScorer
from raylign.scoring.load import load_scorer
from raylign.scoring.usage import MeasuredScorer, Usage, add_up, summary
from tests.judges import Asked, Judged, Reply, group, honest
from tests.scorers import Told, of_prompt, table


def test_latencies_are_means_and_95th_percentiles_worked_out_by_hand() -> None:
    # 19 calls of one item and 0.1 s, one of 2 items and 4 s: items take 19 x 0.1 s and 2 x 2 s.
    metrics = summary({"judge": Usage(calls=[(1, 0.1)] * 19 + [(2, 4.0)])})
    assert metrics["judge/calls"] == 20 and metrics["judge/items"] == 21
    assert metrics["judge/latency_mean_s"] == pytest.approx((19 * 0.1 + 4.0) / 21)
    assert metrics["judge/latency_p95_s"] == 2.0
    assert metrics["judge/call_mean_s"] == pytest.approx((19 * 0.1 + 4.0) / 20)
    assert metrics["judge/call_p95_s"] == 0.1


def test_failures_are_counted_by_reason_under_names_that_metrics_may_have() -> None:
    reasons = {
        "no answer within 5 s; see to the server": 4,
        "HTTP 500: <b>oops</b>": 2,
        "no reference answer in column 'answer' (prompt p1)": 1,
        "no reference answer in column 'answer' (prompt p2)": 2,
        "rare": 1,
    }
    metrics = summary({"a/b": Usage(failures=Counter(reasons))})
    assert {name: value for name, value in metrics.items() if "failures" in name} == {
        "a/b/failures": 10,
        "a/b/failures_no_answer_within_5_s": 4,
        "a/b/failures_no_reference_answer_in_column_answer": 3,
        "a/b/failures_http_500": 2,
    }
    assert "a/b/latency_mean_s" not in metrics, "nothing was asked"


def test_usages_add_up_by_scorer() -> None:
    total: dict[str, Usage] = {}
    add_up(total, {"a": Usage([(2, 1.0)], 3, Counter(x=1), {"tokens": 5.0}), "b": Usage()})
    add_up(total, {"a": Usage([(4, 2.0)], 1, Counter(x=1, y=2), {"tokens": 7.0, "requests": 1.0})})
    assert total["a"] == Usage([(2, 1.0), (4, 2.0)], 4, Counter(x=2, y=2), {"tokens": 12.0, "requests": 1.0})
    assert total["b"] == Usage()


def test_a_scorer_is_timed_and_its_failures_are_kept() -> None:
    def slow(text: str) -> Score:
        time.sleep(0.02)
        return Score(None, reason="late") if text == "b" else Score(1.0)

    usage, began = Usage(), time.monotonic()
    MeasuredScorer(Told(slow), usage).score(of_prompt("p", "a", "b"))
    took = time.monotonic() - began
    [(items, seconds)] = usage.calls
    assert items == 2 and 0.04 <= seconds <= took and usage.failures == Counter(late=1)
    assert MeasuredScorer(table(), usage).score([]) == [] and len(usage.calls) == 1


def test_a_call_that_raises_counts() -> None:
    def refuse(text: str) -> Score:
        raise ScorerError("no")

    usage, spent = Usage(), [0.0]
    with pytest.raises(ScorerError):
        MeasuredScorer(Told(refuse), usage, lambda: {"requests": spent[0]}).score(of_prompt("p", "a"))
    assert [items for items, _ in usage.calls] == [1] and usage.amounts == {"requests": 0.0}


def test_a_judge_tells_tokens_disagreements_and_cost(judged: Judged, tmp_path: Path) -> None:
    def torn(asked: Asked) -> Reply:
        usage = {"total_tokens": 110, "prompt_tokens": 100, "completion_tokens": 10}
        return Reply("A" if "torn" in asked.user else honest(asked).content, usage=usage)

    _, server = judged(torn)
    block = JudgeScoringBlock(base_url=server.base_url, model="m", canaries=False, price_in=2.0, price_out=30.0)
    scorer = load_scorer(block, tmp_path / "scores.sqlite")
    scorer.score([*group("good", "bad", prompt="p"), *group("torn", "bad", prompt="q")])
    metrics = summary(scorer.take_usage())
    expected = {
        "requests": 5,
        "failed_requests": 0,
        "comparisons": 2,
        "disagreements": 1,
        "disagreement_rate": 0.5,
        "tokens": 550,
        "cost_usd": pytest.approx(5 * (100 * 2.0 + 10 * 30.0) / 1e6),
        "cache_hits": 0,
        "items": 4,
    }
    assert {name: metrics[f"judge/{name}"] for name in expected} == expected
    scorer.score(group("good", "bad", prompt="p"))
    again = summary(scorer.take_usage())
    assert (again["judge/cache_hits"], again["judge/calls"], again["judge/failures"]) == (2, 0, 0)


def test_a_judge_without_prices_has_no_cost() -> None:
    scorer = JudgeScorer(JudgeScoringBlock(base_url="http://h/v1", model="m"))
    assert "cost_usd" not in scorer.amounts()
    with pytest.raises(ValueError, match="price_in=1.0 and price_out=None give no cost; set both, or neither"):
        JudgeScoringBlock(base_url="http://h/v1", model="m", price_in=1.0)


def test_metrics_are_numbers_that_json_can_hold() -> None:
    metrics = summary({"judge": Usage([(1, 0.5)], 0, Counter({"(": 1}), {"requests": 2.0})})
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["judge/failures_other"] == 1
