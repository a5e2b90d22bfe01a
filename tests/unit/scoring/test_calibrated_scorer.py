"""A scorer on the scale of people: shares worked out by hand and by simulated people, and where it may stand."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.special import expit

from raylign.config import EvaluateConfig, parse_config
from raylign.config.load import dump_config, parse_tree
from raylign.config.pairing import CorrectWrongPairingBlock
from raylign.config.scoring import (
    CalibratedScoringBlock,
    FunctionScoringBlock,
    JudgeScoringBlock,
    VerifierScoringBlock,
    by_part,
    is_calibrated,
    leaves,
    short_tree,
)
from raylign.errors import ConfigError
from raylign.evaluation.win_rate import judged_pairs, to_compare
from raylign.pairing import build_preferences
from raylign.records import Candidate, Prompt, Score
from raylign.review.choose import directions
from raylign.scoring.base import ScoringItem
from raylign.scoring.composition import PEOPLE, composed
from raylign.scoring.kind import batches, longest_s
from raylign.scoring.load import describe_scorer, load_scorer
from tests.judges import Judged, group, honest, values
from tests.scorers import Told, of_prompt, table

ANY = FunctionScoringBlock()


def scores(told: Told, *items: ScoringItem, slope: float = 1.0, band: float = 0.0, allowed: int = 100) -> list[Score]:
    block = CalibratedScoringBlock(scorer=ANY, slope=slope, band=band)
    return composed(block, {"scorer": told}).score(items, allowed)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_score_is_the_mean_probability_to_be_better_than_the_others() -> None:
    found = scores(table(a=2.0, b=1.0, c=-1.0), *of_prompt("p", "a", "b", "c"), slope=0.5)
    assert values(found) == pytest.approx(
        [
            (sigmoid(0.5) + sigmoid(1.5)) / 2,
            (sigmoid(-0.5) + sigmoid(1.0)) / 2,
            (sigmoid(-1.5) + sigmoid(-1.0)) / 2,
        ]
    )
    assert [score.parts for score in found] == [{"scorer": 2.0}, {"scorer": 1.0}, {"scorer": -1.0}]
    assert sum(score.value or 0 for score in found) == pytest.approx(3 / 2), "every comparison gives one win away"


def test_within_the_band_there_is_a_tie_of_exactly_a_half() -> None:
    band = sigmoid(0.5) - 0.5
    found = scores(table(a=0.5, b=0.0, c=1.1), *of_prompt("p", "a", "b", "c"), band=band)
    assert values(found) == pytest.approx([(0.5 + sigmoid(-0.6)) / 2, (0.5 + sigmoid(-1.1)) / 2, found[2].value])
    assert values(scores(table(a=0.5, b=0.0), *of_prompt("p", "a", "b"), band=band)) == [0.5, 0.5]


def test_simulated_people_have_this_share_of_wins() -> None:
    """People who prefer by Bradley-Terry with this slope: type `human` of many answers comes to the same."""
    generator, slope, answers = np.random.default_rng(0), 1.7, 20_000
    quality = {"a": 0.3, "b": -0.4, "c": 1.2, "d": 0.1}
    won = {text: 0.0 for text in quality}
    for first, second in combinations(quality, 2):
        share = generator.binomial(answers, expit(slope * (quality[first] - quality[second]))) / answers
        won[first] += share / 3
        won[second] += (1 - share) / 3
    people = parse_config({}, ["scoring.type=human"]).scoring
    asked = Prompt("p", ({"role": "user", "content": "?"},), (1,), {PEOPLE: won})
    by_people = composed(people, {"held_out": table()}).score([ScoringItem(asked, text) for text in quality])  # type: ignore[arg-type]
    found = scores(table(**quality), *of_prompt("p", *quality), slope=slope)
    assert values(found) == pytest.approx(values(by_people), abs=0.01)


def test_the_order_of_a_group_is_the_scorers() -> None:
    told = Told(lambda text: Score(float(np.sin(len(text) * 7))))
    texts = ["x" * n for n in range(1, 20)]
    found, own = scores(told, *of_prompt("p", *texts), slope=3.0), [np.sin(len(text) * 7) for text in texts]
    assert np.argsort([score.value or 0.0 for score in found]).tolist() == np.argsort(own).tolist()


def test_one_that_stands_alone_gets_the_scorers_own_value() -> None:
    items = [*of_prompt("p", "a"), *of_prompt("q", "b"), *of_prompt("p", "a", "b")]
    found = scores(table(a=7.0, b=-3.0), *items)
    assert found[:2] == [Score(7.0, {"scorer": 7.0}), Score(-3.0, {"scorer": -3.0})]
    assert values(found[2:]) == pytest.approx([sigmoid(10), sigmoid(-10)])


def test_copies_and_differences_beyond_any_number() -> None:
    assert values(scores(table(a=1.0), *of_prompt("p", "a", "a"))) == [0.5, 0.5]
    assert values(scores(table(a=1.7e308, b=-1.7e308), *of_prompt("p", "a", "b"), slope=3e38)) == [1.0, 0.0]


def test_what_the_scorer_leaves_unscored_is_unscored_and_no_opponent() -> None:
    found = scores(table(a=1.0, b=None, c=0.0), *of_prompt("p", "a", "b", "c"))
    assert found[1] == Score(None, {}, "scorer: no idea")
    assert (found[0].value, found[2].value) == pytest.approx((sigmoid(1), sigmoid(-1)))
    found = scores(table(a=1.0, b=None), *of_prompt("p", "a", "b"), *of_prompt("q", "b"))
    assert found[0] == Score(None, {"scorer": 1.0}, "scorer: no other candidate of its prompt has a value")
    assert [score.reason for score in found[1:]] == ["scorer: no idea"] * 2


def test_the_scorer_is_asked_once_with_what_may_be_lost() -> None:
    told = table(a=1.0, b=2.0)
    composed(CalibratedScoringBlock(scorer=ANY, slope=1, max_unscored=0.5), {"scorer": told}).score(
        [*of_prompt("p", "a", "b"), *of_prompt("q", "a", "b")]
    )
    assert (told.asked, told.allowed) == ([["a", "b", "a", "b"]], [2])


def test_people_and_a_calibrated_scorer_are_members_of_one_composition() -> None:
    inner = {"type": "calibrated", "slope": 2.0, "scorer": {"type": "function"}}
    both = {"people": {"type": "human"}, "model": inner}
    block = parse_config(
        {"scoring": {"type": "weighted", "scorers": both, "weights": dict.fromkeys(both, 0.5)}}
    ).scoring
    assert block.compares and is_calibrated(block) and not is_calibrated(ANY)
    assert list(by_part(block)) == ["", "people", "people/held_out", "model", "model/scorer"]
    assert directions(block) == {"model": 1.0, "model/scorer": 1.0}


INNER = "{type: calibrated, slope: 1, scorer: {type: verifier}}"
CALIBRATED = {"type": "calibrated", "slope": 1.5, "band": 0.1, "scorer": {"type": "function"}}


def test_a_recipe_reads_back_equal_and_its_short_form_too() -> None:
    scorers: list[dict[str, Any]] = [
        {"type": "judge", "base_url": "http://h/v1", "model": "m", "reasons": True, "criterion": 'It\'s "short": ü.'},
        {"type": "verifier", "method": "regex", "pattern": "{answer}$", "max_unscored": 0.5},
        {
            "type": "gate",
            "gate": {"type": "verifier"},
            "score": {"type": "weighted", "scorers": {"a": {"type": "function"}}, "weights": {"a": -1.0}},
        },
        {"type": "reward_model", "path": "here", "chat_template": "there.jinja"},
    ]
    for scorer in scorers:
        config = parse_config({"scoring": CALIBRATED | {"scorer": scorer, "max_unscored": 0.5}})
        assert parse_config(yaml.safe_load(dump_config(config))) == config
        short = short_tree(config.scoring)
        assert short["scorer"] == scorer and "cache" not in str(short)
        assert parse_config({"scoring": short}) == config
    people = parse_config({}, ["scoring={type: human}"]).scoring
    assert short_tree(people) == {"type": "human", "held_out": {"type": "function"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scoring.slope=0", "scoring.slope: 0 says that people prefer what the scorer gives less, or do not mind"),
        ("scoring.slope=-1", "less is better as {type: weighted, scorers: {it: ...}, weights: {it: -1}}, with a"),
        ("scoring.slope=.inf", "scoring.slope: Input should be a finite number"),
        ("scoring.band=0.5", "scoring.band: Input should be less than 0.5"),
        ("scoring.band=-0.1", "scoring.band: Input should be greater than or equal to 0"),
        ("scoring.slop=1", "scoring.slop: unknown key; did you mean 'slope'?"),
        ("scoring.scorer.max_unscored=0.5", "scorer.max_unscored=0.5 would say nothing: the limit is of the whole"),
        ("scoring.scorer={type: human}", "scorer.type=human would be calibrated on people twice"),
        (
            "scoring.scorer={type: min, scorers: {a: {type: human}}}",
            "scorer.type=min would be calibrated on people twice",
        ),
        (
            f"scoring.scorer={INNER}",
            "scorer.type=calibrated would be calibrated on people twice",
        ),
        ("evaluation.num_generations=2", "evaluation.num_generations=2 with a scorer that compares"),
        (
            f"evaluation.gold={INNER}",
            "gold of type calibrated would be its scorer alone",
        ),
        (
            f"evaluation.gold={{type: min, scorers: {{a: {INNER}}}}}",
            "gold of type calibrated would be its scorer alone",
        ),
        (
            f"scoring={{type: gate, gate: {{type: verifier}}, score: {INNER}}}",
            "score of type calibrated: an answer that stands alone",
        ),
        (
            f"scoring={{type: gate, score: {{type: verifier}}, gate: {INNER}}}",
            "gate of type calibrated: an answer that stands alone",
        ),
        ("pairing.optimism=1", "scoring.type=calibrated does not give"),
    ],
)
def test_what_does_not_work_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"scoring": CALIBRATED}, [override])
    assert message in str(caught.value)


def test_several_answers_of_a_policy_are_refused_where_policies_are_compared() -> None:
    raw = {"recipe": "evaluate", "scoring": CALIBRATED, "evaluation": {"num_generations": 2}}
    with pytest.raises(ConfigError, match="evaluation.num_generations=2 with a scorer that compares"):
        parse_tree(raw, EvaluateConfig, "config")


def candidates(prompt: str, *texts: str) -> list[Candidate]:
    return [Candidate(prompt, index, (index,), (0.0,), text, "stop", 0, 0) for index, text in enumerate(texts)]


def test_answers_of_two_policies_win_lose_or_tie_by_the_band() -> None:
    prompts = [Prompt(name, (), (1,)) for name in ("p", "q", "r")]
    own, other = (
        [c for p in "pqr" for c in candidates(p, "a")],
        [c for p, text in (("p", "b"), ("q", "c"), ("r", "d")) for c in candidates(p, text)],
    )
    asked, shown = to_compare(prompts, own, other)
    by_id = {prompt.id: prompt for prompt in asked}
    items = [ScoringItem(by_id[c.prompt_id], c.text) for c in shown]
    found = scores(table(a=0.0, b=0.2, c=2.0, d=-2.0), *items, band=0.1)
    assert [(pair.prompt_id, pair.share) for pair in judged_pairs(shown, found)] == [("p", 0.5), ("q", 0.0), ("r", 1.0)]


def test_ties_make_no_pairs_and_a_threshold_reads_the_share_of_wins() -> None:
    def pairs(pairing: Any, found: Sequence[Score]) -> list[tuple[str, str]]:
        built = build_preferences([Prompt("p", (), (1,))], candidates("p", *"abcd"), found, pairing, 0).preferences
        return [(pair.candidates[0].text, pair.candidates[-1].text) for pair in built]

    found = scores(table(a=3.0, b=2.9, c=-3.0, d=-9.0), *of_prompt("p", *"abcd"), band=0.1)
    right = CorrectWrongPairingBlock(threshold=0.5, max_pairs=9)
    assert sorted(pairs(right, found)) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    best = parse_config({}).pairing
    assert pairs(best, scores(table(a=0.1, b=0.0, c=0.0, d=0.1), *of_prompt("p", *"abcd"), band=0.1)) == []


def test_groups_stay_together_and_deadlines_are_the_scorers() -> None:
    block = CalibratedScoringBlock(scorer=FunctionScoringBlock(batch_size=3, timeout_s=2.0), slope=1)
    items = [*of_prompt("p", *"abcd"), *of_prompt("q", *"ef")]
    assert [len(batch) for batch in batches(items, block)] == [4, 2]
    assert longest_s(items, block) == longest_s(items, block.scorer) > 0 and [leaf.type for leaf in leaves(block)] == [
        "function"
    ]


def test_it_is_described_with_its_scorer_and_loads(judged: Judged, tmp_path: Path) -> None:
    block = CalibratedScoringBlock(scorer=VerifierScoringBlock(method="regex", pattern="x"), slope=1.23456, band=0.04)
    assert describe_scorer(block)[:2] == (
        "share of wins, calibrated on people: slope 1.23, tie band 0.04",
        "scorer: verifier by regex",
    )
    _, server = judged(honest)
    judge = JudgeScoringBlock(base_url=server.base_url, model="m", canaries=False)
    scorer = load_scorer(CalibratedScoringBlock(scorer=judge, slope=2.0), tmp_path / "scores.sqlite")
    found = scorer.score([*group("good", "bad"), *group("good good", prompt="p1")])
    assert values(found) == pytest.approx([sigmoid(2), sigmoid(-2), 2 / 9])
    assert found[0].parts["scorer/comparisons"] == 1.0 and list(scorer.take_usage()) == ["scorer"]
