"""Measures of health against closed forms, enumeration and brute force."""

import math
import random
from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from raylign.config import parse_config
from raylign.config.losses import GrpoLossBlock, MixLossBlock, SigmoidLossBlock, SimpoLossBlock
from raylign.evaluation.health import (
    distinct_n,
    kl_k3,
    kl_k3_per_token,
    kl_per_token,
    round_health,
    sampled_entropy,
    seq_rep_n,
)
from raylign.losses import LossState
from raylign.records import Candidate
from tests.unit.losses.sums import preference_loss
from tests.unit.losses.test_losses import random_candidates


def sampled(tokens: tuple[int, ...], logprobs: tuple[float, ...]) -> Candidate:
    return Candidate("p", 0, tokens, logprobs, "", "stop", 0, 0)


def spoken(*tokens: tuple[int, ...]) -> list[Candidate]:
    return [sampled(ids, (-1.0,) * len(ids)) for ids in tokens]


POLICY, INITIAL = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
"""Probabilities of the tokens 0, 1 and 2."""
DRAWN = [sampled((token,), (math.log(POLICY[token]),)) for token in (0, 0, 1, 2)]
"""Each token as often as the policy draws it, so that means over them are expectations."""
LOGPS = [math.log(INITIAL[candidate.token_ids[0]]) for candidate in DRAWN]
KL = sum(p * math.log(p / q) for p, q in zip(POLICY, INITIAL, strict=True))


def test_both_estimators_have_the_kl_as_their_expectation() -> None:
    assert kl_per_token(DRAWN, LOGPS) == pytest.approx(KL)
    assert kl_k3(DRAWN, LOGPS) == pytest.approx(KL)


def test_k3_is_positive_on_any_sample_and_k1_is_not() -> None:
    """The token that the initial policy likes twice as much: k1 = -ln 2, k3 = 2 - 1 - ln 2."""
    assert kl_per_token(DRAWN[3:], LOGPS[3:]) == pytest.approx(-math.log(2))
    assert kl_k3(DRAWN[3:], LOGPS[3:]) == pytest.approx(1 - math.log(2))


Chain = Mapping[tuple[int, ...], tuple[float, ...]]
CHAIN: Chain = {(): POLICY, (0,): (0.7, 0.2, 0.1), (1,): (0.1, 0.8, 0.1), (2,): (0.3, 0.3, 0.4)}
"""Distributions of the policy by what it has said: the second token depends on the first."""
OTHER: Chain = {(): INITIAL, (0,): (0.6, 0.2, 0.2), (1,): (0.2, 0.6, 0.2), (2,): (0.3, 0.4, 0.3)}
PAIRS = [(first, second) for first in range(3) for second in range(3)]


def by_token(chain: Chain, pair: tuple[int, int]) -> tuple[float, float]:
    return math.log(chain[()][pair[0]]), math.log(chain[pair[:1]][pair[1]])


def test_estimates_by_sequence_and_by_token_agree_with_the_exact_kl() -> None:
    """Every completion of two tokens as often as the policy draws it, in hundredths of a percent."""
    drawn = [pair for pair in PAIRS for _ in range(round(10_000 * math.exp(sum(by_token(CHAIN, pair)))))]
    candidates = [sampled(pair, by_token(CHAIN, pair)) for pair in drawn]
    logprobs = [by_token(OTHER, pair) for pair in drawn]
    of_pairs = [(sum(by_token(CHAIN, pair)), sum(by_token(OTHER, pair))) for pair in PAIRS]
    exact = sum(math.exp(own) * (own - other) for own, other in of_pairs)
    sums = [sum(own) for own in logprobs]
    assert kl_k3(candidates, sums) == pytest.approx(exact)
    assert kl_per_token(candidates, sums) == pytest.approx(exact / 2)
    assert kl_k3_per_token(candidates, logprobs) == pytest.approx(exact / 2)


def test_k3_of_tokens_stays_low_where_whole_completions_are_nats_apart() -> None:
    """100 tokens of 0.05 nats each: 5 nats a completion, where its own k3 is e^-5 - 1 + 5."""
    candidates, logprobs = [sampled((1,) * 100, (-1.0,) * 100)], [(-1.05,) * 100]
    assert kl_k3_per_token(candidates, logprobs) == pytest.approx(math.expm1(-0.05) + 0.05)
    assert kl_k3(candidates, [-105.0]) == pytest.approx(math.expm1(-5) + 5)


def test_kl_per_token_weighs_by_tokens() -> None:
    """3 nats over 1 token and 1 nat over 3: one nat a token; a mean of means would be 5/3."""
    candidates = [sampled((1,), (-1.0,)), sampled((1, 2, 3), (-1.0, -1.0, -1.0))]
    assert kl_per_token(candidates, [-4.0, -4.0]) == pytest.approx(1.0)


def test_what_cannot_be_measured_is_none() -> None:
    assert (kl_per_token(DRAWN, []), kl_k3(DRAWN, [])) == (None, None)
    assert kl_per_token([sampled((), ())], [0.0]) is None and sampled_entropy([sampled((), ())]) is None
    assert kl_k3([sampled((1,), (-800.0,))], [-1.0]) is None, "e^799 is no float"
    assert kl_k3_per_token([sampled((1,), (-800.0,))], [[-1.0]]) is None and kl_k3_per_token([], []) is None


def test_the_sampled_entropy_is_the_entropy_in_expectation() -> None:
    assert sampled_entropy(DRAWN) == pytest.approx(-sum(p * math.log(p) for p in POLICY))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_n_grams_against_strings(n: int) -> None:
    """Every token is a letter; a text's windows are counted by str.count-like brute force."""
    drawn = random.Random(n)
    texts = ["".join(drawn.choices("abc", k=drawn.randint(0, 12))) for _ in range(40)]
    candidates = spoken(*(tuple(map(ord, text)) for text in texts))
    windows = [[text[i : i + n] for i in range(len(text)) if len(text[i : i + n]) == n] for text in texts]
    everything = Counter(window for own in windows for window in own)
    assert distinct_n(candidates, n) == pytest.approx(len(everything) / everything.total())
    repeated = [sum(count - 1 for count in Counter(own).values()) / len(own) for own in windows if own]
    assert seq_rep_n(candidates, n) == pytest.approx(sum(repeated) / len(repeated))


def test_repetition_by_hand() -> None:
    """1 2 3 three times has six 4-grams, three of them distinct; the other repeats nothing and the third has none."""
    looping, fresh, short = (1, 2, 3) * 3, (1, 2, 3, 4, 5), (1, 1, 1)
    assert seq_rep_n(spoken(looping), 4) == pytest.approx(0.5)
    assert seq_rep_n(spoken(looping, fresh, short), 4) == pytest.approx(0.25)
    assert seq_rep_n(spoken(short), 4) == 0.0 == distinct_n(spoken(short), 4)


def rewards(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"rewards/chosen": chosen, "rewards/rejected": rejected} for chosen, rejected in pairs]


@pytest.mark.parametrize(
    ("chosen", "rejected", "displacement"),
    [(-0.4, -0.9, 4.0), (-0.9, -0.4, 4.0), (0.4, -0.9, 0.0), (-0.4, 0.9, 0.0), (0.4, 0.9, 0.0)],
)
def test_displacement_is_how_far_both_have_fallen(chosen: float, rejected: float, displacement: float) -> None:
    steps = rewards((chosen - 0.1, rejected + 0.1), (chosen + 0.1, rejected - 0.1))
    assert round_health(steps, SigmoidLossBlock(beta=0.1)) == {
        "beta": 0.1,
        "logps/chosen_change": pytest.approx(10 * chosen),
        "logps/rejected_change": pytest.approx(10 * rejected),
        "logps/displacement": pytest.approx(displacement),
    }


def test_the_changes_are_those_of_the_log_probs_whatever_the_beta() -> None:
    """From the loss's own rewards, as a trainer logs them."""
    logps = random_candidates(6, 2)
    change = (logps.policy - logps.reference).double().mean(0).tolist()
    for beta in (0.05, 0.4):
        block = SigmoidLossBlock(beta=beta)
        found = preference_loss(logps, block, LossState())
        step = {
            "rewards/chosen": found.chosen_rewards.double().mean().item(),
            "rewards/rejected": found.rejected_rewards.double().mean().item(),
        }
        health = round_health([step], block)
        assert [health["logps/chosen_change"], health["logps/rejected_change"]] == pytest.approx(change, rel=1e-5)
    assert torch.is_tensor(logps.policy)


def test_a_mix_is_measured_by_its_first_loss() -> None:
    loss = parse_config({}, ["loss={loss_type: mix, losses: [{loss_type: ipo, beta: 0.5}, {loss_type: sft}]}"]).loss
    assert isinstance(loss, MixLossBlock)
    assert round_health(rewards((-1.0, -2.0)), loss)["logps/displacement"] == pytest.approx(2.0)


def test_without_log_ratios_to_a_reference_there_is_none() -> None:
    for loss in (SimpoLossBlock(), GrpoLossBlock(beta=0.1)):
        assert round_health(rewards((-1.0, -2.0)), loss) == {}
    assert round_health([{"loss": 0.5}], SigmoidLossBlock(beta=0.2)) == {"beta": 0.2}
    bad = [*rewards((math.nan, math.inf)), *rewards((-0.1, -0.2))]
    assert round_health(bad, SigmoidLossBlock(beta=0.1))["logps/displacement"] == pytest.approx(1.0)
