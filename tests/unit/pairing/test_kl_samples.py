"""Completions that KL is estimated on: none chosen by its score, and what they say is the KL."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from raylign.config import parse_config
from raylign.config.losses import KlLossBlock
from raylign.config.pairing import BestWorstPairingBlock, CorrectWrongPairingBlock, PairingBlock
from raylign.errors import ConfigError, DataError
from raylign.losses.terms import kl_penalty
from raylign.pairing import build_preferences, with_mismatched, with_policy_samples
from raylign.records import Candidate, KlSample, Preference, Prompt, Score

POLICY, REFERENCE = (0.5, 0.3, 0.15, 0.05), (0.1, 0.2, 0.3, 0.4)
"""Probabilities of the completions 0 to 3, one token each, to any prompt; a higher number is a better score."""
RATIOS = [math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True)]
KL = math.fsum(p * ratio for p, ratio in zip(POLICY, RATIOS, strict=True))
K2 = math.fsum(p * ratio**2 / 2 for p, ratio in zip(POLICY, RATIOS, strict=True))


def candidate(prompt: int, index: int, token: int, version: int = 5) -> Candidate:
    return Candidate(f"p{prompt}", index, (token,), (math.log(POLICY[token]),), "", "stop", version, 0)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{number}", (), (100 + number,)) for number in range(count)]


def sampled_round(count: int, size: int, seed: int) -> tuple[list[Prompt], list[Candidate], list[Score]]:
    rng = random.Random(seed)
    drawn = [rng.choices(range(4), POLICY, k=size) for _ in range(count)]
    candidates = [candidate(p, i, token) for p, tokens in enumerate(drawn) for i, token in enumerate(tokens)]
    return prompts(count), candidates, [Score(float(one.token_ids[0])) for one in candidates]


def preferred(count: int, size: int, block: PairingBlock, seed: int) -> tuple[Preference, ...]:
    asked, candidates, scores = sampled_round(count, size, seed)
    made = build_preferences(asked, candidates, scores, block, seed).preferences
    return with_policy_samples(made, asked, candidates, size, seed)


def ratios(samples: Sequence[KlSample | None]) -> list[float]:
    return [RATIOS[sample.token_ids[0]] for sample in samples if sample is not None]


@pytest.mark.parametrize(
    ("size", "block"),
    [(8, BestWorstPairingBlock()), (2, CorrectWrongPairingBlock(threshold=1.5)), (2, BestWorstPairingBlock())],
    ids=["best and worst of 8", "a right and a wrong one of 2", "2 that differ"],
)
def test_the_mean_log_ratio_is_the_kl_though_pairs_and_prompts_are_chosen_by_score(
    size: int, block: PairingBlock
) -> None:
    """Against the closed form, which the compared candidates miss: prompts whose answers tie give no pair at all."""
    found = preferred(4_000, size, block, seed=1)
    own = ratios([one.kl_sample for one in found])
    assert len(own) == len(found)
    compared = [RATIOS[one.token_ids[0]] for preference in found for one in preference.candidates]
    error = 4 * math.sqrt(math.fsum((ratio - KL) ** 2 for ratio in own)) / len(own)
    assert abs(fmean(own) - KL) < error and abs(fmean(compared) - KL) > 2 * error
    assert fmean(ratio**2 / 2 for ratio in own) == pytest.approx(K2, rel=0.1)


def test_the_gradient_of_the_kl_term_on_them_is_that_of_the_kl() -> None:
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor(REFERENCE, dtype=torch.float64).log()
    ratio = logits.log_softmax(0) - reference
    (expected,) = torch.autograd.grad((logits.softmax(0) * ratio).sum(), logits, retain_graph=True)
    found = preferred(8_000, 8, BestWorstPairingBlock(), seed=2)
    tokens = torch.tensor([one.kl_sample.token_ids[0] for one in found if one.kl_sample])
    (estimate,) = torch.autograd.grad(kl_penalty(ratio[tokens]).mean(), logits, retain_graph=True)
    assert (estimate - expected).abs().max() < 0.04
    ends = torch.tensor([one.token_ids[0] for preference in found for one in preference.candidates])
    (biased,) = torch.autograd.grad(kl_penalty(ratio[ends]).mean(), logits)
    assert (biased - expected).abs().max() > 0.1


def preference(prompt: int, *completions: tuple[int, ...]) -> Preference:
    candidates = tuple(Candidate(f"p{prompt}", i, ids, (), "", "stop", 0, 0) for i, ids in enumerate(completions))
    count = len(completions)
    return Preference(prompts(prompt + 1)[prompt], candidates, (1.0,) * count, (1.0,) * count)


def test_prompts_take_turns_and_a_preference_gets_its_own_prompts_sample_if_drawn() -> None:
    asked = prompts(3)
    candidates = [candidate(p, i, i) for p in range(3) for i in range(4)]
    pairs = [preference(0, (0,), (1,)), preference(0, (2,), (1,)), preference(2, (0,), (3,))]
    found = with_policy_samples(pairs, asked, candidates, 4, seed=3)
    assert [replace(one, kl_sample=None) for one in found] == pairs
    behind = [one.kl_sample.prompt_token_ids for one in found if one.kl_sample]
    assert sorted(behind) == [(100,), (101,), (102,)] and behind[2] == (102,) and behind[0] == (100,)
    assert all(
        one.kl_sample and one.kl_sample.sampler_logp == math.log(POLICY[one.kl_sample.token_ids[0]]) for one in found
    )
    assert found == with_policy_samples(pairs, asked, candidates, 4, seed=3)
    assert found != with_policy_samples(pairs, asked, candidates, 4, seed=4)


def test_all_of_a_prompts_candidates_come_before_one_comes_again() -> None:
    candidates = [candidate(0, i, i) for i in range(4)]
    found = with_policy_samples([preference(0, (0,), (1,))] * 8, prompts(1), candidates, 4, seed=0)
    assert Counter(one.kl_sample.token_ids for one in found if one.kl_sample) == {(i,): 2 for i in range(4)}


def test_samples_of_the_reference_and_of_further_attempts_are_left_out() -> None:
    of_policy = [candidate(p, i, 0) for p in range(2) for i in range(2)]
    of_reference = [candidate(p, 2, 1, version=0) for p in range(2)]
    later = [candidate(1, i, 2) for i in (3, 4)]
    candidates = sorted([*of_policy, *of_reference, *later], key=lambda one: (one.prompt_id, one.index))
    found = with_policy_samples([preference(p % 2, (0,), (1,)) for p in range(40)], prompts(2), candidates, 3, seed=0)
    assert {one.kl_sample.token_ids for one in found if one.kl_sample} == {(0,)}


def test_a_row_gets_an_answer_of_another_row_behind_its_own_prompt() -> None:
    rows = [preference(p, (p, 0), (p, 1)) for p in range(50)]
    found = with_mismatched(rows, 100, seed=7, what="to train on")
    assert [replace(row, kl_sample=None) for row in found] == rows
    samples = [row.kl_sample for row in found if row.kl_sample]
    assert [sample.prompt_token_ids for sample in samples] == [row.prompt.token_ids for row in rows]
    takes = [sample.token_ids[0] for sample in samples]
    assert all(one != row for row, one in enumerate(takes)) and sorted(takes) == list(range(50))
    # Which of the other row's answers it is, is drawn.
    assert {sample.token_ids[1] for sample in samples} == {0, 1}
    assert found == with_mismatched(rows, 100, seed=7, what="to train on")
    assert found != with_mismatched(rows, 100, seed=8, what="to train on")


def test_rows_of_one_prompt_never_take_from_each_other() -> None:
    shared = [replace(preference(0, (n, 0), (n, 1)), prompt=Prompt(f"s{n}", (), (100,))) for n in range(9)]
    rows = [*shared, preference(1, (50,), (51,)), preference(2, (60,), (61,))]
    for seed in range(20):
        found = with_mismatched(rows, 100, seed, "to train on")
        for row in found:
            assert row.kl_sample is not None
            own = {
                c.token_ids
                for other in rows
                if other.prompt.token_ids == row.prompt.token_ids
                for c in other.candidates
            }
            assert row.kl_sample.token_ids not in own


@pytest.mark.parametrize(
    "rows", [[], [preference(0, (1,), (2,))], [preference(0, (1,), (2,)), preference(0, (3,), (4,))]]
)
def test_one_prompt_has_no_other_rows_answer(rows: list[Preference]) -> None:
    with pytest.raises(DataError, match=f"the {len(rows)} rows held out have {min(1, len(rows))} different prompt"):
        with_mismatched(rows, 100, 0, "held out")


def test_a_mismatched_answer_is_cut_where_the_row_has_no_room() -> None:
    long = replace(preference(0, (1,), (2,)), prompt=Prompt("long", (), tuple(range(200, 206))))
    found = with_mismatched([long, preference(1, tuple(range(7)), tuple(range(7)))], 8, 0, "to train on")
    assert [row.kl_sample.token_ids for row in found if row.kl_sample][0] == (0, 1)


def test_a_kl_term_weighed_by_score_is_refused() -> None:
    mix = "loss={loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: kl}]}"
    parse_config({}, [mix])
    with pytest.raises(ConfigError, match="would weigh the term kl by score.*set pairing.weights=none"):
        parse_config({}, [mix, "pairing={type: best_worst, weights: margin}"])


def test_only_kto_and_kl_ask_for_a_sample() -> None:
    for loss, asks in (("sigmoid", False), ("kto", True), ("simpo", False), ("bco_pair", False)):
        assert parse_config({}, [f"loss.loss_type={loss}"]).loss.needs_kl_sample is asks
    assert KlLossBlock().needs_kl_gradient and not KlLossBlock().needs_kl_baseline
