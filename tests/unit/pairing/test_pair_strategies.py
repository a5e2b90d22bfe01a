"""Which candidates of a prompt are paired, in every way there is: five candidates, scores by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from raylign.config import OfflineDpoConfig, parse_config
from raylign.config.load import overridden, parse_tree
from raylign.config.pairing import PairingBlock, PairingUnion
from raylign.errors import ConfigError, NoPreferencesError, ScorerError
from raylign.pairing import PairingResult, build_preferences, require_preferences, without_pair
from raylign.records import Candidate, FinishReason, Prompt, Score

ADAPTER: TypeAdapter[PairingBlock] = TypeAdapter(PairingUnion)
PROMPT = Prompt("a", ({"role": "user", "content": "a"},), (1,))
TYPES = (
    "best_worst",
    "best_random",
    "random_worst",
    "best_second",
    "correct_wrong",
    "all_pairs",
    "top_m",
    "quantile",
    "sigma",
    "length_matched",
    "ranking",
    "group",
    "policy_reference",
)
Value = float | tuple[float, float] | None
"""A score, a score with an ensemble's std, or none."""
FIVE: list[Value] = [0.3, 0.9, 0.1, 0.7, 0.5]
"""From the best: 1, 3, 4, 0, 2."""


def block(**options: Any) -> PairingBlock:
    return ADAPTER.validate_python(options)


def candidate(index: int, tokens: Sequence[int], finish: FinishReason = "stop") -> Candidate:
    return Candidate("a", index, tuple(tokens), (-1.0,) * len(tokens), str(tokens), finish, 0, index)


def score(value: Value) -> Score:
    if value is None:
        return Score(None, reason="late")
    return Score(value[0], {"std": value[1]}) if isinstance(value, tuple) else Score(value)


def build(
    values: Sequence[Value],
    *,
    lengths: Sequence[int] = (),
    truncated: Sequence[int] = (),
    seed: int = 0,
    pairing: PairingBlock,
) -> PairingResult:
    """Pairing of one prompt whose candidate i has `lengths[i]` tokens (1), all of them i + 10."""
    sizes = lengths or [1] * len(values)
    candidates = [
        candidate(index, [index + 10] * size, "length" if index in truncated else "stop")
        for index, size in enumerate(sizes)
    ]
    return build_preferences([PROMPT], candidates, [score(value) for value in values], pairing, seed)


def pairs(result: PairingResult) -> list[tuple[int, ...]]:
    return [tuple(c.index for c in preference.candidates) for preference in result.preferences]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": "best_worst"}, [(1, 2)]),
        ({"type": "best_second"}, [(1, 3)]),
        ({"type": "all_pairs"}, [(1, 3), (1, 4), (1, 0), (1, 2), (3, 4), (3, 0), (3, 2), (4, 0), (4, 2), (0, 2)]),
        ({"type": "top_m", "m": 2}, [(1, 0), (1, 2), (3, 0), (3, 2)]),
        ({"type": "top_m", "m": 9}, [(1, 0), (1, 2), (3, 0), (3, 2)]),
        ({"type": "quantile"}, [(1, 2)]),
        ({"type": "quantile", "rejected": 0.25}, [(1, 0)]),
        ({"type": "quantile", "chosen": 0.75, "rejected": 0.5}, [(3, 4)]),
        ({"type": "quantile", "chosen": 0.55, "rejected": 0.5}, [(4, 0)]),
        ({"type": "quantile", "chosen": 0.05, "rejected": 0.02}, [(0, 2)]),
        # Mean 0.5, std sqrt(0.08) = 0.283.
        ({"type": "sigma"}, [(1, 2)]),
        ({"type": "sigma", "rejected": -0.5}, [(1, 0)]),
        ({"type": "sigma", "chosen": 0.8, "rejected": 0}, [(3, 4)]),
        ({"type": "sigma", "chosen": -3, "rejected": -4}, [(0, 2)]),
        ({"type": "ranking"}, [(1, 3, 4, 0, 2)]),
        ({"type": "ranking", "max_candidates": 3}, [(1, 4, 2)]),
        ({"type": "group"}, [(1, 3, 4, 0, 2)]),
        ({"type": "correct_wrong", "max_pairs": 99}, [(1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4)]),
    ],
)
def test_what_is_compared(options: dict[str, Any], expected: list[tuple[int, ...]]) -> None:
    pairing = block(**options)
    found = pairs(build(FIVE, pairing=pairing))
    assert sorted(found) == sorted(expected)
    assert len(found) <= pairing.most(len(FIVE))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.6, 0.6, 0.6], "ties"),
        ([None, 0.6, None], "unscored_groups"),
        ([None, None, None], "unscored_groups"),
        ([], "unscored_groups"),
    ],
)
def test_groups_without_a_pair(kind: str, values: list[Value], reason: str) -> None:
    result = build(values, pairing=block(type=kind))
    expected = "one_sided" if kind == "correct_wrong" and reason == "ties" else reason
    assert result.preferences == () and result.counts[expected] == 1
    assert sum(result.counts[name] for name in ("ties", "unscored_groups", "one_sided", "one_sampler")) == 1
    assert without_pair([PROMPT], result) == [PROMPT]
    with pytest.raises(NoPreferencesError, match="round 1 gave no pair"):
        require_preferences(result, 1)


@pytest.mark.parametrize("kind", TYPES)
def test_two_candidates_make_one_pair(kind: str) -> None:
    result = build([0.2, 0.8], pairing=block(type=kind))
    (preference,) = result.preferences
    assert pairs(result) == [(1, 0)] and preference.scores == (0.8, 0.2) and preference.weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"type": "best_random"}, {(1, 0), (1, 2), (1, 3), (1, 4)}),
        ({"type": "random_worst"}, {(0, 2), (1, 2), (3, 2), (4, 2)}),
        ({"type": "correct_wrong"}, {(1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4)}),
    ],
)
def test_random_choices_depend_on_the_seed_alone(options: dict[str, Any], possible: set[tuple[int, ...]]) -> None:
    pairing = block(**options)
    found = [pairs(build(FIVE, seed=seed, pairing=pairing)) for seed in range(60)]
    assert found == [pairs(build(FIVE, seed=seed, pairing=pairing)) for seed in range(60)]
    assert all(len(one) == 1 for one in found) and {one[0] for one in found} == possible


def sampled_by(versions: Sequence[int], values: Sequence[Value], seed: int, tokens: Sequence[int]) -> PairingResult:
    """Candidate i is of policy version `versions[i]` and has the one token `tokens[i]`."""
    candidates = [
        replace(candidate(index, [token]), policy_version=version)
        for index, (version, token) in enumerate(zip(versions, tokens, strict=True))
    ]
    scores = [score(value) for value in values]
    return build_preferences([PROMPT], candidates, scores, block(type="policy_reference"), seed)


@pytest.mark.parametrize(
    ("versions", "possible"),
    [
        ((3, 3, 3, 0, 0), {(3, 0), (1, 3), (3, 2), (0, 4), (1, 4), (4, 2)}),
        ((3, 0, 3, 3, 0), {(1, 0), (1, 2), (1, 3), (0, 4), (4, 2), (3, 4)}),
        ((3, 3, 3, 3, 0), {(0, 4), (1, 4), (4, 2), (3, 4)}),
    ],
)
def test_a_random_candidate_of_the_policy_against_one_of_the_reference(
    versions: tuple[int, ...], possible: set[tuple[int, int]]
) -> None:
    """In the order of their scores; here 0 and 4 have 0.3 and 0.2."""
    values: list[Value] = [0.3, 0.9, 0.1, 0.7, 0.2]
    found = [pairs(sampled_by(versions, values, seed, range(5))) for seed in range(80)]
    assert found == [pairs(sampled_by(versions, values, seed, range(5))) for seed in range(80)]
    assert all(len(one) == 1 for one in found) and {one[0] for one in found} == possible


def test_two_random_candidates_where_the_policy_is_the_reference() -> None:
    found = {pairs(sampled_by((2, 2, 2), [0.3, 0.9, 0.1], seed, range(3)))[0] for seed in range(40)}
    assert found == {(1, 0), (1, 2), (0, 2)}


@pytest.mark.parametrize(
    ("values", "tokens"), [([0.3, 0.9, None], [1, 2, 3]), ([0.3, 0.9, 0.1], [1, 2, 2]), ([None, None, 0.1], [1, 2, 3])]
)
def test_a_prompt_without_a_usable_candidate_of_the_reference_is_counted(
    values: list[Value], tokens: list[int]
) -> None:
    """The reference's is unscored, or says what the policy says; or only the reference's is left."""
    result = sampled_by((3, 3, 0), values, 0, tokens)
    left = "unscored_groups" if values[0] is None else "one_sampler"
    assert result.preferences == () and result.counts[left] == 1
    with pytest.raises(NoPreferencesError, match="round 4 gave no pair"):
        require_preferences(result, 4)


def test_some_of_all_pairs_are_drawn() -> None:
    found = [pairs(build(FIVE, seed=seed, pairing=block(type="all_pairs", max_pairs=3))) for seed in range(60)]
    assert {len(set(one)) for one in found} == {3}
    assert len({pair for one in found for pair in one}) == 10


def test_equals_are_never_compared_by_those_that_look_below() -> None:
    values: list[Value] = [0.9, 0.9, 0.1]
    for kind in ("best_second", "best_random"):
        assert pairs(build(values, pairing=block(type=kind))) == [(0, 2)]
    assert sorted(pairs(build(values, pairing=block(type="all_pairs")))) == [(0, 2), (1, 2)]
    assert pairs(build(values, pairing=block(type="ranking"))) == [(0, 1, 2)]


def test_lengths_are_matched_within_the_margins() -> None:
    """Gaps: 0-1 0.1, 0-2 0.8, 1-2 0.7; the closest pair of all in length may be too close in score."""
    values: list[Value] = [0.9, 0.8, 0.1]
    matched, apart = block(type="length_matched"), block(type="length_matched", min_margin=0.5)
    assert pairs(build(values, lengths=[5, 5, 4], pairing=matched)) == [(0, 1)]
    assert pairs(build(values, lengths=[5, 5, 4], pairing=apart)) == [(0, 2)]
    assert pairs(build(values, lengths=[7, 5, 4], pairing=apart)) == [(1, 2)]
    far = block(type="length_matched", min_margin=2)
    assert build(values, lengths=[7, 5, 4], pairing=far).counts["below_margin"] == 1


def test_margins_bound_the_gap_on_both_sides() -> None:
    found = build([0.25, 1.0, 0.0, 0.75, 0.5], pairing=block(type="all_pairs", min_margin=0.5, max_margin=0.5))
    assert sorted(pairs(found)) == [(1, 4), (3, 0), (4, 2)]
    wide: list[Value] = [0.9, 0.1]
    assert build(wide, pairing=block(type="best_worst", max_margin=0.5)).counts["above_margin"] == 1
    assert build(wide, pairing=block(type="best_worst", min_margin=1)).counts["below_margin"] == 1


@pytest.mark.parametrize(
    ("how", "cut", "expected"),
    [
        ("keep", [1], [(1, 2)]),
        ("drop", [1], [(3, 2)]),
        ("drop", [1, 2], [(3, 0)]),
        ("reject_only", [2], [(1, 2)]),
        ("reject_only", [1], [(3, 2)]),
        ("reject_only", [1, 3], [(4, 2)]),
    ],
)
def test_truncated_candidates_are_kept_dropped_or_only_rejected(
    how: str, cut: list[int], expected: list[tuple[int, int]]
) -> None:
    assert pairs(build(FIVE, truncated=cut, pairing=block(type="best_worst", truncated=how))) == expected


def test_a_prompt_of_truncated_candidates_is_counted() -> None:
    dropped = build(FIVE, truncated=[0, 1, 2, 3], pairing=block(type="best_worst", truncated="drop"))
    assert dropped.preferences == () and dropped.counts["truncated_groups"] == 1
    only = block(type="best_worst", truncated="reject_only")
    for cut in ([0, 1, 2, 3, 4], [0, 1, 3, 4]):
        chosen = build(FIVE, truncated=cut, pairing=only)
        assert chosen.preferences == () and chosen.counts["truncated_chosen"] == 1


def test_a_truncated_one_in_a_list_may_stand_below_all_that_ended() -> None:
    ranking = block(type="ranking", truncated="reject_only")
    assert pairs(build(FIVE, truncated=[2], pairing=ranking)) == [(1, 3, 4, 0, 2)]
    assert pairs(build(FIVE, truncated=[0], pairing=ranking)) == [(1, 3, 4, 2)]
    assert pairs(build(FIVE, truncated=[0, 2], pairing=ranking)) == [(1, 3, 4, 0, 2)]


@pytest.mark.parametrize("kind", ["best_random", "random_worst", "correct_wrong", "all_pairs"])
def test_what_is_drawn_passes_the_filters(kind: str) -> None:
    """Of FIVE only the best and the worst are 0.8 apart; truncated, candidate 3 is never the better one."""
    apart = block(type=kind, min_margin=0.75)
    assert {tuple(pairs(build(FIVE, seed=seed, pairing=apart))) for seed in range(20)} == {((1, 2),)}
    ended = block(type=kind, truncated="reject_only")
    found = {pair for seed in range(60) for pair in pairs(build(FIVE, seed=seed, truncated=[3], pairing=ended))}
    assert found and all(better != 3 for better, _ in found)


def test_every_prompt_without_a_pair_has_its_reason() -> None:
    prompts = [Prompt(name, (), (1,)) for name in "abc"]
    candidates = [Candidate(name, index, (index,), (-1.0,), "", "stop", 0, 0) for name in "abc" for index in (0, 1)]
    scores = [score(value) for value in (0.5, 0.5, 0.9, 0.1, None, 0.2)]
    result = build_preferences(prompts, candidates, scores, block(type="best_worst"), seed=0)
    assert result.dropped == {"a": "ties", "c": "unscored_groups"}
    assert without_pair(prompts, result) == [prompts[0], prompts[2]]


def test_near_duplicates_count_as_the_first() -> None:
    """Bigrams of 1 2 3 4 and 1 2 3 5: {12, 23, 34} and {12, 23, 35}, of which 2 of 4 are shared."""
    candidates = [candidate(0, (1, 2, 3, 4)), candidate(1, (1, 2, 3, 5)), candidate(2, (7,))]
    scores = [Score(1.0), Score(0.0), Score(0.5)]

    def built(limit: float, count: int = 3) -> PairingResult:
        pairing = block(type="best_worst", near_duplicates=limit)
        return build_preferences([PROMPT], candidates[:count], scores[:count], pairing, seed=0)

    assert pairs(built(0.51)) == [(0, 1)] and pairs(built(0.5)) == [(0, 2)]
    assert built(0.5, count=2).counts["near_duplicates"] == 1


def test_length_is_taken_off_the_score() -> None:
    """1.0 - 0.1 x 8 = 0.2 and 0.5 - 0.1 x 1 = 0.4."""
    built = build([1.0, 0.5], lengths=[8, 1], pairing=block(type="best_worst", length_penalty=0.1))
    (preference,) = built.preferences
    assert pairs(built) == [(1, 0)] and preference.scores == pytest.approx((0.4, 0.2))


def test_optimism_selects_and_the_score_decides() -> None:
    """Upper bounds at optimism 1: 0.9, 1.1, 0.8; of 1 and 2, candidate 2 has the higher score."""
    values: list[Value] = [(0.7, 0.2), (0.1, 1.0), (0.6, 0.2)]
    assert pairs(build(values, pairing=block(type="best_worst"))) == [(0, 1)]
    hopeful = block(type="best_worst", optimism=1)
    assert pairs(build(values, pairing=hopeful)) == [(2, 1)]
    with pytest.raises(ScorerError, match="candidate 0 of prompt a does not have; score with scoring.type=mean_std"):
        build([0.1, 0.2], pairing=hopeful)
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ScorerError, match=f"candidate 1 of prompt a has std={std}; a scorer must give a finite"):
            build([(0.1, 0.0), (0.2, std)], pairing=hopeful)
    assert pairs(build([(0.1, 0.0), (0.2, float("nan"))], pairing=block(type="best_worst"))) == [(1, 0)]


def test_weights_have_a_mean_of_1() -> None:
    """Gaps 0.8 and 0.4: 4/3 and 2/3. Std 0, 1 and 0, 2: 1/2 and 1/5, over their mean 0.35."""
    prompts = [Prompt(name, (), (1,)) for name in "ab"]
    candidates = [Candidate(name, index, (index,), (-1.0,), "", "stop", 0, 0) for name in "ab" for index in (0, 1)]
    scores = [score(value) for value in ((0.9, 0.0), (0.1, 1.0), (0.5, 0.0), (0.1, 2.0))]

    def weights(how: str) -> list[float]:
        result = build_preferences(prompts, candidates, scores, block(type="best_worst", weights=how), seed=0)
        return [weight for preference in result.preferences for weight in preference.weights]

    assert weights("margin") == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])
    assert weights("uncertainty") == pytest.approx([0.5 / 0.35, 0.5 / 0.35, 0.2 / 0.35, 0.2 / 0.35])
    assert weights("none") == [1.0] * 4


def test_the_loss_must_read_what_is_built() -> None:
    with pytest.raises(ConfigError, match="loss.loss_type=sigmoid compares two candidates, and pairing.type=ranking"):
        parse_config({}, ["pairing.type=ranking"])
    parse_config({}, ["pairing.type=ranking", "loss={loss_type: plackett_luce}"])
    parse_config({}, ["pairing.type=all_pairs", "loss={loss_type: plackett_luce}"])
    with pytest.raises(ConfigError, match="chosen=0.1 is not above rejected=0.5"):
        parse_config({}, ["pairing={type: quantile, chosen: 0.1, rejected: 0.5}"])
    with pytest.raises(ConfigError, match="chosen=-2 is not above rejected=-2"):
        parse_config({}, ["pairing={type: sigma, chosen: -2}"])
    with pytest.raises(ConfigError, match="min_margin=1 is above max_margin=0.5"):
        parse_config({}, ["pairing={min_margin: 1, max_margin: 0.5}"])


@pytest.mark.parametrize("pairing", ["{optimism: 1}", "{weights: uncertainty}"])
def test_the_scorer_must_give_the_std_that_is_read(pairing: str) -> None:
    member = "{type: verifier}"
    alone, ensemble = f"scoring={member}", f"scoring={{type: mean_std, scorers: {{a: {member}, b: {member}}}}}"
    with pytest.raises(ConfigError, match="an ensemble's std, which scoring.type=verifier does not give"):
        parse_config({}, [f"pairing={pairing}", alone])
    assert parse_config({}, [f"pairing={pairing}", ensemble]).pairing.needs_std
    assert parse_config({}, [f"pairing={pairing}"]).pairing.needs_std
    assert not parse_config({}, [alone]).pairing.needs_std


def test_more_pairs_a_prompt_plan_more_steps() -> None:
    few, many = (
        parse_config({}, ["sampling.num_generations=4", "schedule.prompts_per_round=10", f"pairing={{type: {kind}}}"])
        for kind in ("best_worst", "all_pairs")
    )
    assert (few.max_preferences_per_round, many.max_preferences_per_round) == (10, 60)
    again = parse_config({}, ["sampling={max_resamples: 2}", "schedule.prompts_per_round=10", "pairing.type=all_pairs"])
    assert again.max_preferences_per_round == 10 * 12 * 11 // 2


def test_a_long_right_answer_stays_right() -> None:
    """A verifier's 1 at 30 tokens is 0.7 less 0.3 after the penalty, 1 at 80 tokens 0.2, 0 at 10 tokens -0.1."""
    pairing = block(type="correct_wrong", length_penalty=0.01, max_pairs=9)
    built = build([1.0, 1.0, 0.0, 0.0], lengths=[30, 80, 10, 1], pairing=pairing)
    assert pairs(built) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert [p.scores for p in built.preferences][2] == pytest.approx((0.2, -0.1))
    # Whole groups of long right answers have no wrong one among them.
    assert build([1.0, 1.0], lengths=[80, 1], pairing=pairing).dropped == {"a": "one_sided"}
    assert build([0.0, 0.0], lengths=[80, 1], pairing=pairing).dropped == {"a": "one_sided"}


def test_a_penalty_that_outweighs_a_right_answer_leaves_the_pair_out() -> None:
    """1 - 0.01 x 120 is below 0 - 0.01 x 10: nothing is taught by it, least of all that the wrong answer is better."""
    pairing = block(type="correct_wrong", length_penalty=0.01)
    result = build([1.0, 0.0], lengths=[120, 10], pairing=pairing)
    assert result.preferences == () and result.dropped == {"a": "penalised"}
    with pytest.raises(NoPreferencesError, match="puts below the wrong ones: lower pairing.length_penalty"):
        require_preferences(result, 1)
    # What is drawn at random is drawn among the others.
    for seed in range(20):
        assert pairs(build([1.0, 1.0, 0.0], lengths=[120, 20, 10], seed=seed, pairing=pairing)) == [(1, 2)]


def test_a_loss_with_a_threshold_goes_without_a_length_penalty() -> None:
    kto = "loss={loss_type: kto, desirable_above: 0.5}"
    ranked = ["pairing.type=ranking", "pairing.length_penalty=0.01"]
    with pytest.raises(ConfigError, match="desirable_above=0.5 would read scores less pairing.length_penalty=0.01"):
        parse_config({}, [*ranked, kto])
    with pytest.raises(ConfigError, match="desirable_above=0.5"):
        parse_config({}, [*ranked, "loss={loss_type: mix, losses: [{loss_type: kto, desirable_above: 0.5}]}"])
    assert parse_config({}, [*ranked, "loss.loss_type=kto"]).loss.score_thresholds == ()
    assert parse_config({}, ["pairing.type=ranking", kto]).loss.score_thresholds == ("desirable_above=0.5",)


def test_a_group_has_every_scored_candidate_copies_too() -> None:
    """A mean over samples counts each of them; a ranking has no use for a copy."""
    candidates = [candidate(index, ids, "stop") for index, ids in enumerate(([1], [2, 2], [1], [3]))]
    scores = [score(value) for value in (0.5, 0.9, 0.5, None)]
    for kind, expected in (("group", [(1, 0, 2)]), ("ranking", [(1, 0)])):
        assert pairs(build_preferences([PROMPT], candidates, scores, block(type=kind), seed=0)) == expected
    cut = build([0.1, 0.9, 0.5], truncated=[1], pairing=block(type="group", truncated="drop"))
    assert pairs(cut) == [(2, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near_duplicates": 0.5}, "near_duplicates=0.5 would leave copies out"),
        ({"truncated": "reject_only"}, "truncated=reject_only would leave out truncated candidates by their score"),
        ({"optimism": 1.0}, "optimism=1 selects candidates, and a group has all"),
    ],
)
def test_nothing_is_chosen_from_a_group(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        block(type="group", **options)


FUNCTION = "loss={loss_type: function, function: 'my:loss', needs_samples: true, pairs_only: false}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sampling.temperature=0.7", "sampling.temperature=0.7 samples from another one; set it to 1"),
        ("sampling.top_p=0.9", "sampling.top_p=0.9 samples from another one; set it to 1"),
        ("sampling.top_k=50", "sampling.top_k=50 samples from another one; set it to 0"),
    ],
)
def test_who_weighs_samples_by_their_probability_gets_the_policys_own(option: str, message: str) -> None:
    parse_config({}, [FUNCTION])
    with pytest.raises(ConfigError, match=f"function weighs samples .*, and {message}"):
        parse_config({}, [FUNCTION, option])
    with pytest.raises(ConfigError, match="reference_generations=1 samples from another one"):
        parse_config({}, [FUNCTION, "model.lora={}", "sampling.reference_generations=1"])
    with pytest.raises(ConfigError, match="weighs samples of the policy by the log-probs they were sampled with"):
        parse_tree(overridden({"data": {"source": "rows.jsonl"}}, [FUNCTION]), OfflineDpoConfig, "config")
