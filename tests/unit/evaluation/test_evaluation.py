"""Evaluation against numbers worked out by hand."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from raylign.config.evaluation import EvaluationBlock
from raylign.errors import ScorerError
from raylign.evaluation.held_out import evaluate, mean_interval
from raylign.records import Candidate, FinishReason, Prompt, Score

BLOCK = EvaluationBlock(bootstrap_samples=2000)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), ({"role": "user", "content": "?"},), (1,)) for i in range(count)]


def candidate(name: int, index: int, tokens: tuple[int, ...], logp: float, finish: FinishReason = "stop") -> Candidate:
    """Completion whose log-probabilities sum to `logp`."""
    logprobs = (logp, *[0.0] * (len(tokens) - 1))
    return Candidate(str(name), index, tokens, logprobs, "", finish, 0, 0)


def test_every_number_by_hand() -> None:
    candidates = [
        candidate(0, 0, (1, 2, 1, 2), -3.0),  # bigrams 12 21 12
        candidate(0, 1, (1, 2), -1.0),  # 12
        candidate(1, 0, (5,), -2.0, "length"),  # none
        candidate(1, 1, (2, 1, 3), -4.0),  # 21 13
    ]
    scores = [Score(1.0), Score(0.0), Score(0.2), Score(None, reason="late")]
    result = evaluate(prompts(2), candidates, scores, [-4.0, -1.5, -2.0, -4.5], BLOCK, seed=0)
    assert result.score == pytest.approx((0.5 + 0.2) / 2)  # prompts weigh the same, however many are scored
    assert result.kl == pytest.approx((1.0 + 0.5 + 0.0 + 0.5) / 4)
    assert result.length == pytest.approx(10 / 4)
    assert result.distinct_2 == pytest.approx(3 / 6)  # 12, 21, 13 of six
    assert result.eos_rate == pytest.approx(3 / 4)
    assert (result.completions, result.unscored) == (4, 1)
    assert (result.score_low, result.score_high) == pytest.approx((0.2, 0.5))  # means of two draws: .2, .35, .5


def test_the_interval_is_that_of_the_mean() -> None:
    count = 100
    values = np.random.default_rng(1).normal(0.3, 1.0, count)
    candidates = [candidate(i, 0, (1, 2), 0.0) for i in range(count)]
    result = evaluate(prompts(count), candidates, [Score(float(v)) for v in values], [0.0] * count, BLOCK, seed=0)
    half = 1.96 * values.std(ddof=1) / 10
    assert result.score == pytest.approx(values.mean())
    assert result.score_low == pytest.approx(values.mean() - half, abs=0.03)
    assert result.score_high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_interval_repeats_with_its_seed_and_widens_with_confidence() -> None:
    candidates = [candidate(i, 0, (1,), 0.0) for i in range(20)]
    scores = [Score(float(i % 7)) for i in range(20)]

    def interval(confidence: float, seed: int) -> tuple[float, float]:
        block = EvaluationBlock(confidence=confidence)
        result = evaluate(prompts(20), candidates, scores, [0.0] * 20, block, seed)
        return result.score_low, result.score_high

    assert interval(0.95, 1) == interval(0.95, 1) != interval(0.95, 2)
    assert interval(0.99, 1)[0] < interval(0.5, 1)[0] < interval(0.5, 1)[1] < interval(0.99, 1)[1]


@pytest.mark.parametrize("values", [[0.7], [0.1, 0.1, 0.1]])
def test_no_spread_gives_no_width(values: list[float]) -> None:
    candidates = [candidate(i, 0, (), 0.0) for i in range(len(values))]
    empty = [Candidate(c.prompt_id, 0, (), (), "", "length", 0, 0) for c in candidates]
    result = evaluate(prompts(len(values)), empty, [Score(v) for v in values], [0.0] * len(values), BLOCK, seed=0)
    assert result.score_low == result.score_high == result.score == pytest.approx(values[0])
    assert (result.distinct_2, result.length, result.eos_rate) == (0.0, 0.0, 0.0)


def test_a_prompt_without_any_score_is_left_out() -> None:
    candidates = [candidate(i, 0, (1,), 0.0) for i in range(2)]
    result = evaluate(prompts(2), candidates, [Score(0.4), Score(None, reason="late")], [0.0, 0.0], BLOCK, seed=0)
    assert (result.score, result.unscored) == (0.4, 1)


def test_nothing_scored_is_an_error() -> None:
    candidates = [candidate(i, 0, (1,), 0.0) for i in range(2)]
    with pytest.raises(ScorerError, match=r"0 of 2 held-out completions were scored.*'late'"):
        evaluate(prompts(2), candidates, [Score(None, reason="late")] * 2, [0.0, 0.0], BLOCK, seed=0)


def test_reference_logps_must_be_parallel() -> None:
    candidates = [candidate(0, index, (1,), 0.0) for index in range(2)]
    with pytest.raises(ValueError, match="shorter"):
        evaluate(prompts(1), candidates, [Score(0.4)] * 2, [-1.0], BLOCK, seed=0)


def test_without_a_reference_there_is_no_kl() -> None:
    assert evaluate(prompts(1), [candidate(0, 0, (1,), 0.0)], [Score(0.4)], [], BLOCK, seed=0).kl is None


@pytest.mark.parametrize("count", [2, 37])
def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    theirs = bootstrap(
        (values,),
        np.mean,
        n_resamples=BLOCK.bootstrap_samples,
        confidence_level=BLOCK.confidence,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert mean_interval(values, BLOCK, 3) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
