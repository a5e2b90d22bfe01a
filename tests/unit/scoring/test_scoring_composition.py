"""Scorers made of scorers: values worked out by hand, what is unscored, what is asked, and how a recipe names them."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylign.config import parse_config
from raylign.config.load import dump_config
from raylign.config.scoring import (
    Composition,
    FunctionScoringBlock,
    GateScoringBlock,
    HttpScoringBlock,
    JudgeScoringBlock,
    MeanStdScoringBlock,
    MinScoringBlock,
    VerifierScoringBlock,
    WeightedScoringBlock,
    leaves,
)
from raylign.errors import ConfigError, ScorerError
from raylign.records import Score
from raylign.scoring.base import ItemScorer, ScoringItem
from raylign.scoring.composition import composed
from raylign.scoring.kind import batches, longest_s
from raylign.scoring.load import describe_scorer, load_scorer
from tests.judges import Judged, group, honest, values
from tests.scorers import Told, of_prompt, table

HERE = Path(__file__).parents[1]
ANY = FunctionScoringBlock()
TWO = {"good": ANY, "short": ANY}
WEIGHTED = WeightedScoringBlock(scorers=TWO, weights={"good": 1.0, "short": -0.5})
MIN = MinScoringBlock(scorers=TWO)
MEAN_STD = MeanStdScoringBlock(scorers={**TWO, "kind": ANY}, std_coefficient=-2.0)
GATE = GateScoringBlock(gate=ANY, score=ANY, threshold=1.0, otherwise=-1.0)


def score(
    block: Composition, members: dict[str, Told], items: Sequence[ScoringItem], allowed: int = 100
) -> list[Score]:
    scorers: dict[str, ItemScorer] = {**members}
    return composed(block, scorers).score(items, allowed)


def test_weighted_is_the_weighted_sum_and_parts_keep_the_members() -> None:
    members = {"good": table(a=Score(2.0, {"rating": 7.0}), b=-1.0), "short": table(a=1.0, b=4.0)}
    assert score(WEIGHTED, members, of_prompt("p", "a", "b")) == [
        Score(1.5, {"good": 2.0, "good/rating": 7.0, "short": 1.0}),
        Score(-3.0, {"good": -1.0, "short": 4.0}),
    ]


def test_min_is_the_worst_member() -> None:
    members = {"good": table(a=2.0, b=-1.0), "short": table(a=1.0, b=4.0)}
    assert values(score(MIN, members, of_prompt("p", "a", "b"))) == [1.0, -1.0]


def test_mean_std_is_the_lower_bound_and_keeps_the_uncertainty() -> None:
    members = {"good": table(a=1.0, b=3.0), "short": table(a=1.0, b=5.0), "kind": table(a=1.0, b=10.0)}
    same, apart = score(MEAN_STD, members, of_prompt("p", "a", "b"))
    assert same == Score(1.0, {"good": 1.0, "short": 1.0, "kind": 1.0, "mean": 1.0, "std": 0.0})
    # Mean 6; squares of -3, -1 and 4 have the mean 26/3.
    assert apart.parts["mean"] == 6.0 and apart.parts["std"] == pytest.approx((26 / 3) ** 0.5)
    assert apart.value == pytest.approx(6.0 - 2.0 * (26 / 3) ** 0.5)


def test_an_item_that_one_member_leaves_unscored_is_unscored_with_its_name() -> None:
    members = {"good": table(a=1.0, b=2.0), "short": table(a=None, b=2.0)}
    for block in (WEIGHTED, MIN):
        scores = score(block, members, of_prompt("p", "a", "b"))
        assert scores[0] == Score(None, {"good": 1.0}, "short: no idea")
        assert scores[1].value is not None


def test_reasons_are_kept_by_the_name_of_who_gave_them() -> None:
    """A scored whole has none of its own; what is unscored keeps those of members that have a value."""
    inner = Score(1.0, {"rating": 7.0}, "", {"rating": "seven"})
    members = {"good": table(a=Score(2.0, {}, "kind"), b=Score(1.0, {}, "rude")), "short": table(a=inner, b=None)}
    found = score(WEIGHTED, members, of_prompt("p", "a", "b"))
    assert (found[0].reason, found[0].part_reasons) == ("", {"good": "kind", "short/rating": "seven"})
    assert (found[1].reason, found[1].part_reasons) == ("short: no idea", {"good": "rude"})
    gates = {
        "gate": table(a=Score(1.0, {}, "open"), b=Score(0.0, {}, "shut")),
        "score": table(a=Score(3.0, {}, "kind")),
    }
    found = score(GATE, gates, of_prompt("p", "a", "b"))
    assert [own.part_reasons for own in found] == [{"gate": "open", "score": "kind"}, {"gate": "shut"}]


def test_a_sum_that_overflows_is_unscored() -> None:
    block = WeightedScoringBlock(scorers=TWO, weights={"good": 1e38, "short": 1.0})
    members = {"good": table(a=1e300), "short": table(a=1.0)}
    assert score(block, members, of_prompt("p", "a"))[0].reason == "the members' values come to inf"


def test_members_are_not_asked_once_too_many_are_unscored() -> None:
    members = {"good": table(a=None, b=None, c=1.0), "short": table(a=1.0, b=1.0, c=1.0)}
    scores = score(WEIGHTED, members, of_prompt("p", "a", "b", "c"), allowed=1)
    assert [s.reason for s in scores] == [
        "good: no idea",
        "good: no idea",
        "short: skipped: more than 20% of items already unscored",
    ]
    assert members["good"].allowed == [1] and members["short"].asked == []


def test_a_gate_lets_the_score_count_where_it_is_open() -> None:
    members = {"gate": table(a=1.0, b=0.5, c=None, d=1.5), "score": table(a=0.25, d=None)}
    assert score(GATE, members, of_prompt("p", "a", "b", "c", "d"), allowed=3) == [
        Score(0.25, {"gate": 1.0, "score": 0.25}),
        Score(-1.0, {"gate": 0.5}),
        Score(None, {}, "gate: no idea"),
        Score(None, {"gate": 1.5}, "score: no idea"),
    ]
    assert members["score"].asked == [["a", "d"]], "what the gate stops is not asked about"
    assert members["score"].allowed == [2]


def test_an_error_while_scoring_names_the_place_of_the_member() -> None:
    def refuse(text: str) -> Score:
        raise ScorerError("the key is refused")

    inner = composed(GATE, {"gate": table(a=1.0), "score": Told(refuse)})
    with pytest.raises(ScorerError, match="^scoring.scorers.good.score: the key is refused$"):
        composed(WEIGHTED, {"good": inner, "short": table(a=1.0)}).score(of_prompt("p", "a"))


def test_a_gate_keeps_groups_apart_whose_neighbours_it_stops() -> None:
    members = {"gate": table(a=1.0, b=0.0, c=1.0), "score": table(a=1.0, c=3.0)}
    items = [*of_prompt("p", "a"), *of_prompt("q", "b"), *of_prompt("p", "c"), *of_prompt("r", "a")]
    assert values(score(GATE, members, items)) == [1.0, -1.0, 3.0, 1.0]
    assert members["score"].asked == [["a"], ["c", "a"]]


def test_a_judge_behind_a_gate_compares_what_has_passed(judged: Judged) -> None:
    judge, _ = judged(honest)
    gate = Told(lambda text: Score(float("bad" not in text)))
    scorer = composed(GATE, {"gate": gate, "score": judge})
    assert values(scorer.score(group("good good", "bad good good good", "good", ""))) == [1.0, -1.0, 0.5, 0.0]


def recipe(**scorers: Any) -> dict[str, Any]:
    return {"scoring": {"type": "weighted", "scorers": scorers, "weights": dict.fromkeys(scorers, 1.0)}}


JUDGE = {"type": "judge", "base_url": "http://h/v1", "model": "m"}


def test_a_recipe_may_nest_compositions_and_reads_back_equal() -> None:
    inner = {"type": "gate", "gate": {"type": "verifier"}, "score": JUDGE}
    config = parse_config(recipe(judge=inner, brevity={"type": "function", "function": "m:f"}))
    assert [leaf.type for leaf in leaves(config.scoring)] == ["verifier", "judge", "function"]
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert config.scoring.title == "+1 judge +1 brevity"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("scoring.scorers.judge.modle=x", "scoring.scorers.judge.modle: unknown key; did you mean 'model'?"),
        ("scoring.scorers.gate.metod=x", "scoring.scorers.gate.metod: unknown key; did you mean 'method'?"),
        (
            "scoring.scorers.gate.type=verifer",
            "scoring.scorers.gate.type: unknown value 'verifer'; did you mean 'verifi",
        ),
        ("scoring.scorers.x={function: a:b}", "scoring.scorers.x.type: Field required"),
        ("scoring.wieghts=1", "scoring.wieghts: unknown key; did you mean 'weights'?"),
        ("scoring.weights={judge: 1}", "weights are of judge, scorers are gate, judge; give one weight per scorer"),
        ("scoring.scorers.B2={type: verifier}", "'B2' is no name of a scorer; take small letters, digits and undersc"),
        ("scoring.scorers.judge.max_unscored=0.5", "scorers.judge.max_unscored=0.5 would say nothing: the limit is of"),
        ("evaluation.num_generations=2", "evaluation.num_generations=2 with a scorer that compares"),
        ("scoring={type: mean_std, scorers: {a: {type: verifier}}}", "scorers=a cannot disagree; name two at least"),
        (
            "scoring={type: mean_std, scorers: {std: {type: verifier}, a: {type: verifier}}}",
            "scorers=std would hide the part of that name",
        ),
        ("scoring={type: min, scorers: {}}", "scoring.scorers: Dictionary should have at least 1 item"),
        (
            "scoring={type: gate, gate: {type: verifier, thresold: 1}, score: {type: function}}",
            "scoring.gate.thresold: unknown key",
        ),
    ],
)
def test_wrong_members_are_named_by_their_place(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(recipe(judge=JUDGE, gate={"type": "verifier"}), [wrong])
    assert message in str(caught.value)


def test_batches_and_deadlines_are_those_of_all_members() -> None:
    function = FunctionScoringBlock(batch_size=3, timeout_s=2.0)
    http = HttpScoringBlock(url="http://h/", batch_size=2, concurrency=2, timeout_s=1.0, retries=0)
    judge = JudgeScoringBlock(base_url="http://h/v1", model="m", batch_size=2)
    items = [*of_prompt("p", *"abc"), *of_prompt("q", *"de")]
    pair = MinScoringBlock(scorers={"one": function, "two": http})
    assert [len(batch) for batch in batches(items, pair)] == [4, 1]
    assert longest_s(items, pair) == 2 * 2.0 * 5 + 4.0
    assert [len(batch) for batch in batches(items, MinScoringBlock(scorers={"one": function, "two": judge}))] == [3, 2]


def test_describe_names_every_member_and_the_place_of_one_that_fails() -> None:
    good = FunctionScoringBlock(function="raylign.scoring.vader:compound")
    block = GateScoringBlock(gate=VerifierScoringBlock(), score=good)
    lines = describe_scorer(block)
    assert lines[:4] == (
        "score where gate >= 1, else -1",
        "gate: verifier by math",
        "  reference answers in column 'answer'",
        "score: raylign.scoring.vader:compound",
    )
    bad = WeightedScoringBlock(
        scorers={"inner": MinScoringBlock(scorers={"bad": FunctionScoringBlock(function="none:f")})},
        weights={"inner": 1.0},
    )
    with pytest.raises(ScorerError, match="^scoring.scorers.inner.scorers.bad: scoring.function=none:f cannot"):
        describe_scorer(bad)


def test_a_composition_is_loaded_from_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    length = FunctionScoringBlock(function="user_scores:length")
    raising = FunctionScoringBlock(function="user_scores:raising")
    block = WeightedScoringBlock(
        scorers={"length": length, "inner": MinScoringBlock(scorers={"one": raising, "two": length})},
        weights={"length": 0.5, "inner": 1.0},
    )
    scorer = load_scorer(block, tmp_path / "scores.sqlite")
    try:
        scores = scorer.score(of_prompt("p", "abcd", "bad"), allowed=2)
        assert scores[0] == Score(3.0, {"length": 4.0, "inner": 1.0, "inner/one": 1.0, "inner/two": 4.0})
        assert scores[1].reason == r"inner: one: ValueError: cannot read 'bad' \x1b[31m"
        assert sorted(scorer.take_usage()) == ["inner/one", "inner/two", "length"]
    finally:
        scorer.close()
    broken = MinScoringBlock(scorers={"one": length, "two": FunctionScoringBlock(function="user_scores:lenght")})
    with pytest.raises(ScorerError, match="^scoring.scorers.two: scoring.function=user_scores:lenght") as caught:
        load_scorer(broken, tmp_path / "scores.sqlite")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "it comes from another process"
