"""Each rule of the guard on measures made up for it, and the choice of the best version beside transformers' own."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers.trainer_callback import EarlyStoppingCallback

from raylign.config import parse_config
from raylign.config.evaluation import MEASURES, OF_PAIRS, EvaluationBlock
from raylign.config.guard import GuardRule, GuardUnion
from raylign.config.losses import LossBlock
from raylign.evaluation.guard import (
    Best,
    Decision,
    best_version,
    decide,
    ended_early,
    loss_after,
    measures,
    over_optimisation,
)
from raylign.evaluation.health import DISPLACED
from raylign.records import Evaluation, HeldOutEvaluation, RoundReport

BASELINE = Evaluation(0.1, 0.0, 0.2, 0.0, 40.0, 0.8, 0.6, 32, 0, gold=0.5, gold_low=0.4, gold_high=0.6)
BOUNDS = {"": 0.6, "_low": 0.5, "_high": 0.7}
_RULE: TypeAdapter[GuardRule] = TypeAdapter(GuardUnion)


def rule(**options: Any) -> GuardRule:
    return _RULE.validate_python(options)


def after(index: int, displaced: float | None = None, **changed: Any) -> RoundReport:
    health = {} if displaced is None else {DISPLACED: displaced}
    evaluation = replace(BASELINE, **changed)
    return RoundReport(index, index, {"preferences": 1}, (), {}, evaluation, {}, {}, health)


def golds(*means: float, score: float = 1.0) -> list[RoundReport]:
    return [
        after(index, gold=mean, gold_low=mean - 0.1, gold_high=mean + 0.1, score=score)
        for index, mean in enumerate(means, 1)
    ]


def test_every_measure_is_there_once_it_was_measured() -> None:
    full = {name: 0.5 for name in ("kl_initial", "kl_initial_per_token", "kl_initial_k3", "entropy", "distinct_1")}
    full["kl_initial_k3_per_token"] = 0.5
    full |= {"distinct_3": 0.5, "seq_rep_4": 0.0, "truncated_rate": 0.1}
    rates = ("win_rate", "win_rate_length_controlled", "win_rate_previous")
    full |= {f"{rate}{bound}": 0.5 for rate in rates for bound in ("", "_low", "_high")}
    assert measures(BASELINE, [after(1, 3.0, **full)])[1].keys() == set(MEASURES)


def test_measures_of_held_out_rows_are_trls_with_bounds_and_displacement() -> None:
    rows = HeldOutEvaluation("rewards/accuracies", 0.6, 0.5, 0.7, 20, {"loss": 0.6, "rewards/accuracies": 0.6})
    report = RoundReport(1, 1, {"preferences": 1}, (), {}, rows, {}, {}, {DISPLACED: 2.5})
    first, second = measures(rows, [report])
    expected = {"loss": 0.6, **{f"rewards/accuracies{bound}": value for bound, value in BOUNDS.items()}}
    assert (first, second) == (expected, {**expected, "displacement": 2.5})
    assert set(second) <= set(OF_PAIRS)


def test_measures_of_rounds_by_hand() -> None:
    first, second, third = measures(BASELINE, [after(1, 2.5, gold=0.8, length=60.0), after(2, gold=0.2, length=20.0)])
    assert (first["length_growth"], second["length_growth"], third["length_growth"]) == (0.0, 0.5, -0.5)
    assert (first["gold_drop"], second["gold_drop"]) == (0.0, 0.0) and third["gold_drop"] == pytest.approx(0.6)
    assert second["displacement"] == 2.5 and not {"displacement"} & (first.keys() | third.keys())


def test_without_a_gold_scorer_nothing_drops() -> None:
    (only,) = measures(replace(BASELINE, gold=None), [])
    assert not {"gold", "gold_drop"} & only.keys()


@pytest.mark.parametrize(
    ("measure", "bound", "reports"),
    [
        ("kl", {"above": 2.0}, [after(1, kl=2.1)]),
        ("kl_initial_per_token", {"above": 0.05}, [after(1, kl_initial_per_token=0.06)]),
        ("length_growth", {"above": 0.5}, [after(1, length=61.0)]),
        ("gold_drop", {"above": 0.25}, golds(0.9, 0.6)),
        ("displacement", {"above": 5.0}, [after(1, 5.1)]),
        ("entropy", {"below": 0.5}, [after(1, entropy=0.4)]),
        ("score", {"below": 0.0}, [after(1, score=-0.1)]),
        ("seq_rep_4", {"above": 0.2}, [after(1, seq_rep_4=0.3)]),
        ("eos_rate", {"below": 0.5}, [after(1, eos_rate=0.4)]),
    ],
)
def test_a_rule_holds_past_its_bound_alone(measure: str, bound: dict[str, float], reports: list[RoundReport]) -> None:
    index, newest = len(reports), measures(BASELINE, reports)[-1]
    held = rule(measure=measure, action="warn", **bound)
    assert decide([held], newest, index) == (Decision(held, newest[measure]),)
    (side, _), value = next(iter(bound.items())), newest[measure]
    exactly = rule(measure=measure, action="warn", **{side: value})
    assert decide([exactly], newest, index) == (), "a bound is still within itself"


def test_a_rule_waits_and_skips_what_was_not_measured() -> None:
    late = rule(measure="score", above=0.0, action="stop", after_rounds=2)
    assert [len(decide([late], {"score": 1.0}, index)) for index in (1, 2, 3)] == [0, 0, 1]
    assert decide([late], {"kl": 1.0}, 3) == ()


def loss(text: str) -> LossBlock:
    options = ["reference.policy=initial"]
    options += ["pairing.type=group"] if "grpo" in text else []
    return parse_config({}, [f"loss={text}", *options]).loss


def raises(action: str, factor: float) -> Decision:
    return Decision(rule(measure="kl", above=0.0, action=action, factor=factor), 1.0)


@pytest.mark.parametrize(
    ("before", "action", "expected"),
    [
        ("{loss_type: sigmoid, beta: 0.1}", "raise_beta", "{loss_type: sigmoid, beta: 0.6}"),
        ("{loss_type: grpo, beta: 0.05}", "raise_kl", "{loss_type: grpo, beta: 0.3}"),
        (
            "{loss_type: mix, losses: [{loss_type: ipo, beta: 0.5}, {loss_type: sft}, {loss_type: kl}]}",
            "raise_beta",
            "{loss_type: mix, losses: [{loss_type: ipo, beta: 3.0}, {loss_type: sft}, {loss_type: kl}], "
            "loss_weights: [1, 1, 1]}",
        ),
        (
            "{loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: kl}], loss_weights: [1, 0.02]}",
            "raise_kl",
            "{loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: kl}], loss_weights: [1, 0.12]}",
        ),
    ],
)
def test_what_was_raised_twice_and_thrice_is_six_times_itself(before: str, action: str, expected: str) -> None:
    warned = Decision(rule(measure="kl", above=0.0, action="warn"), 1.0)
    found = loss_after(loss(before), [raises(action, 2.0), warned, raises(action, 3.0)])
    assert flat(found) == pytest.approx(flat(loss(expected)))


def flat(block: LossBlock) -> dict[str, Any]:
    """Numbers and names by place."""
    whole = block.model_dump(mode="json")
    members = {f"{n}.{key}": value for n, own in enumerate(whole.pop("losses", ())) for key, value in own.items()}
    weights = dict(enumerate(whole.pop("loss_weights", None) or ()))
    return {**whole, **members, **{f"weight {n}": value for n, value in weights.items()}}


def test_decisions_are_told_in_a_line() -> None:
    assert raises("raise_beta", 2.0).told == "kl is 1, above 0: loss.beta x 2 from the next round on"
    stop = Decision(rule(measure="gold_drop", above=0.2, action="stop"), 0.31)
    assert stop.told == "gold_drop is 0.31, above 0.2: the run ends here"


def test_a_stop_ends_the_run_until_its_rule_is_gone() -> None:
    stop = rule(measure="gold_drop", above=0.2, action="stop")
    newest = (Decision(stop, 0.31),)
    assert ended_early([stop], None, newest, [{}]) == "guard: gold_drop is 0.31, above 0.2"
    assert ended_early([rule(measure="gold_drop", above=0.4, action="stop")], None, newest, [{}]) is None
    assert ended_early([], None, newest, [{}]) is None


@pytest.mark.parametrize("seed", range(30))
def test_patience_is_that_of_transformers(seed: int) -> None:
    """Its callback hears of every evaluation before its trainer takes note of a better one."""
    drawn = random.Random(seed)
    greater, patience, threshold = drawn.random() < 0.5, drawn.randint(1, 4), drawn.choice([0.0, 0.1, 0.5])
    values = [round(drawn.uniform(0, 1), 1) for _ in range(12)]
    block = EvaluationBlock(
        metric_for_best_model="score",
        greater_is_better=greater,
        early_stopping_patience=patience,
        early_stopping_threshold=threshold,
    )
    callback = EarlyStoppingCallback(patience, threshold)
    args: Any = SimpleNamespace(metric_for_best_model="eval_score", greater_is_better=greater)
    state: Any = SimpleNamespace(best_metric=None)
    control: Any = SimpleNamespace(should_training_stop=False)
    for index, value in enumerate(values):
        callback.on_evaluate(args, state, control, {"eval_score": value})
        if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
            state.best_metric = value
        seen = [{"score": own} for own in values[: index + 1]]
        best = best_version(block, seen)
        assert best is not None and best.value == state.best_metric
        assert best.version == values.index(best.value), "the earliest of equals"
        assert (ended_early((), block, (), seen) is not None) == control.should_training_stop
        if control.should_training_stop:
            break


def test_versions_that_were_not_measured_are_passed_over() -> None:
    block = EvaluationBlock(metric_for_best_model="gold")
    assert best_version(block, [{}, {"gold": 0.1}, {}, {"gold": 0.0}]) == Best(1, 0.1, 1)
    assert best_version(block, [{}, {}]) is None


def test_over_optimisation_is_a_score_that_rose_while_gold_fell() -> None:
    """Version 1 has gold 0.8 in [0.7, 0.9]."""

    def versions(gold: float, score: float) -> list[Evaluation]:
        later = [*golds(0.8), *golds(gold, score=score)]
        return [BASELINE, *(report.evaluation for report in later if isinstance(report.evaluation, Evaluation))]

    (note,) = over_optimisation(versions(0.6, 2.0))
    assert note.startswith("over-optimisation: since round 1 the score rose from 1.000 to 2.000 while the gold score")
    assert "from 0.800 [0.700, 0.900] to 0.600" in note
    assert over_optimisation(versions(0.6, 0.9)) == [], "the score fell too"
    assert over_optimisation(versions(0.75, 2.0)) == [], "within the interval"
    assert over_optimisation([replace(BASELINE, gold=None)] * 2) == []
