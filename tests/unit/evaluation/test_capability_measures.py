"""What log-probs come to, against closed forms and other estimators."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from raylign.config.evaluation import EvaluationBlock
from raylign.evaluation.capability.measures import ItemResult, measures, summary
from raylign.evaluation.held_out import mean_interval

BLOCK = EvaluationBlock()


def choice(name: str, logps: Sequence[float], answer: int, sizes: Sequence[int] = (1, 1)) -> ItemResult:
    return ItemResult(name, tuple(logps), tuple(sizes), 2, answer)


def text(name: str, logp: float, tokens: int, size: int) -> ItemResult:
    return ItemResult(name, (logp,), (size,), tokens)


def test_accuracy_by_hand() -> None:
    """a: -2 beats -3, and -2/1 loses to -3/3. b: equal, so the first is taken. c: wrong by either."""
    items = [choice("a", (-2, -3), 0, (1, 3)), choice("b", (-1, -1), 1), choice("c", (-5, -1), 0)]
    found = measures("quiz", items)
    assert {name: list(values) for name, values in found.items()} == {"quiz": [1, 0, 0], "quiz_norm": [0, 0, 0]}
    assert list(measures("quiz", [choice("a", (-2, -3), 1, (1, 3))])["quiz_norm"]) == [1]


def test_a_uniform_model_has_its_vocabulary_as_perplexity() -> None:
    vocabulary = 50
    items = [text(str(n), -n * math.log(vocabulary), n, 4 * n) for n in (3, 10, 40)]
    found = {name: values.mean() for name, values in measures("news", items).items()}
    assert found["news"] == pytest.approx(vocabulary)
    assert found["news_nats_per_token"] == pytest.approx(math.log(vocabulary))
    assert found["news_bits_per_byte"] == pytest.approx(math.log2(vocabulary) / 4)
    assert np.ptp(measures("news", items)["news"]) == pytest.approx(0, abs=1e-9), "texts of any length say the same"


def corpus(seed: int, number: int = 60) -> list[ItemResult]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 300, number)
    return [text(str(i), -float(n * rng.normal(3.0, 0.3)), int(n), int(4 * n)) for i, n in enumerate(tokens)]


def test_perplexity_is_that_of_the_whole_and_varies_like_the_jackknife() -> None:
    items = corpus(0)
    nats, counts = np.array([-item.logps[0] for item in items]), np.array([item.tokens for item in items])
    values = measures("news", items)["news"]
    assert values.mean() == pytest.approx(math.exp(nats.sum() / counts.sum()))
    left_out = np.exp((nats.sum() - nats) / (counts.sum() - counts))
    jackknife = math.sqrt((len(items) - 1) / len(items) * ((left_out - left_out.mean()) ** 2).sum())
    assert values.std(ddof=1) / math.sqrt(len(items)) == pytest.approx(jackknife, rel=0.05)


def test_intervals_and_changes_are_those_of_the_items() -> None:
    before = {"quiz": [choice(str(i), (0, -1) if i < 30 else (-1, 0), 0) for i in range(60)]}
    after = {"quiz": [choice(str(i), (0, -1) if i < 24 else (-1, 0), 0) for i in range(60)]}
    found = summary(after, before, BLOCK, 0)
    assert (found["quiz"], found["quiz_norm"], found["quiz_change"]) == pytest.approx((0.4, 0.4, -0.1))
    lost = np.array([-1.0] * 6 + [0.0] * 54)
    assert (found["quiz_change_low"], found["quiz_change_high"]) == mean_interval(lost, BLOCK, 0)
    assert (found["quiz_low"], found["quiz_high"]) == mean_interval(np.array([1.0] * 24 + [0.0] * 36), BLOCK, 0)
    assert found["quiz_change_high"] < 0 < found["quiz_high"] - found["quiz_low"] - 0.2, "pairs tell more"


def test_a_perplexity_that_every_text_shares_in_is_told_from_chance() -> None:
    """Texts differ by much more than training changed them: the paired interval does not see that."""
    before = corpus(1)
    after = [text(item.id, item.logps[0] - 0.02 * item.tokens, item.tokens, item.sizes[0]) for item in before]
    found = summary({"news": after}, {"news": before}, BLOCK, 0)
    assert found["news_change"] == pytest.approx(found["news"] * (1 - math.exp(-0.02)))
    assert 0 < found["news_change_low"] < found["news_change"] < found["news_change_high"]
    assert found["news_change_high"] - found["news_change_low"] < 0.1 * (found["news_high"] - found["news_low"])


def test_no_change_is_told_of_other_items_or_tasks() -> None:
    items = [choice("a", (0, -1), 0), choice("b", (0, -1), 0)]
    for before in ({}, {"other": items}, {"quiz": items[:1]}, {"quiz": [items[0], choice("c", (0, -1), 0)]}):
        assert set(summary({"quiz": items}, before, BLOCK, 0)) == {"quiz", "quiz_low", "quiz_high", "quiz_norm"}


def test_items_that_lm_eval_has_scored() -> None:
    items = [ItemResult(str(i), (), (), 0, None, {"acc": float(i < 3), "acc_norm": 1.0}) for i in range(4)]
    found = summary({"arc": items}, {"arc": items}, BLOCK, 0)
    assert (found["arc"], found["arc_acc_norm"], found["arc_change"]) == (0.75, 1.0, 0.0)
