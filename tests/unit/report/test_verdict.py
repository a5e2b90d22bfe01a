"""The verdict on a run: better, worse or neither, by the answers to the same prompts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from raylign.config import OfflineDpoConfig, OnlineDpoConfig, RewardModelConfig
from raylign.config.evaluation import GOLD
from raylign.config.guard import StopRule, WarnRule
from raylign.config.load import parse_tree
from raylign.config.scoring import HumanScoringBlock
from raylign.evaluation.guard import Decision
from raylign.records import Candidate, Evaluation, HeldOutEvaluation, Prompt, RoundReport, Score
from raylign.report.measures import MEASURES, capability_chart, chart_name, measured, shown, written
from raylign.report.record import Answer, RunRecord, read_run
from raylign.report.verdict import paired_gains, verdict
from raylign.run.directory import create_run
from raylign.run.tables import write_candidates
from tests.unit.report.run_records import BASELINE, config_of, evaluated, save_answers, save_run

STEADY = [0.1 + 0.01 * (i % 3) for i in range(20)]


def answers(scores: dict[str, float | None]) -> list[Answer]:
    return [Answer(name[0], "?", "text", score, "") for name, score in scores.items()]


def test_a_small_steady_gain_is_better_though_the_intervals_of_the_means_overlap(tmp_path: Path) -> None:
    found = verdict(read_run(save_run(tmp_path, STEADY)))
    assert found.word == "better"
    assert found.sentence.startswith("Better: held-out score went from 0.200 [0.100, 0.300] to 0.600 [0.500, 0.700]")
    assert "in 2 of 3 rounds, by +0.110 [+0.10" in found.sentence and "20 prompts" in found.sentence
    assert not any("chance" in note for note in found.notes)


def test_who_scored_what_is_held_out_is_named_where_people_score_the_rest(tmp_path: Path) -> None:
    record = read_run(save_run(tmp_path, STEADY))
    assert isinstance(record.config, OnlineDpoConfig)
    asked = record.config.model_copy(update={"scoring": HumanScoringBlock()})
    found = verdict(replace(record, config=asked)).sentence
    assert found.startswith("Better: held-out score by raylign.scoring.vader:compound went from 0.200")


def test_a_loss_is_worse_and_noise_is_neither(tmp_path: Path) -> None:
    assert verdict(read_run(save_run(tmp_path, [-gain for gain in STEADY], "worse"))).word == "worse"
    noise = [0.3 if i % 2 else -0.28 for i in range(20)]
    assert verdict(read_run(save_run(tmp_path, noise, "noise"))).word == "unclear"


def test_the_word_agrees_with_a_paired_t_test_away_from_its_edge(tmp_path: Path) -> None:
    """The bootstrap is ours, the test is scipy's; where p is far from 5 % they cannot differ."""
    draw = np.random.default_rng(0)
    for number, mean in enumerate((0.3, -0.3, 0.0, 0.02)):
        gains = list(mean + 0.2 * draw.standard_normal(20))
        p = ttest_1samp(gains, 0.0).pvalue
        assert p < 0.02 or p > 0.1
        word = verdict(read_run(save_run(tmp_path, gains, f"run-{number}"))).word
        assert word == ("unclear" if p > 0.1 else "better" if mean > 0 else "worse")


def test_gains_are_by_prompt_and_leave_out_what_one_side_has_no_score_of() -> None:
    before = answers({"a1": 0.0, "a2": 1.0, "b1": 0.2, "c1": None, "d1": 0.3})
    after = answers({"a1": 1.0, "b1": 0.1, "c1": 0.5, "e1": 0.9})
    assert paired_gains(before, after) == pytest.approx([0.5, -0.1])


def test_without_a_finished_round_there_is_nothing_to_tell(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    directory = create_run(config.run, config)
    assert verdict(read_run(directory)).word == "untrained"
    directory.write_baseline(BASELINE)
    save_answers(directory.round(0), [0.1])
    assert verdict(read_run(directory)).word == "untrained"


def test_what_guard_and_choice_came_to_is_told_in_order_of_rounds(tmp_path: Path) -> None:
    warned = Decision(WarnRule(measure="kl_initial", above=2.0, action="warn"), 2.5)
    stopped = Decision(StopRule(measure="length", above=30.0, action="stop"), 40.0)
    directory = save_run(tmp_path, STEADY)
    directory.write_decisions(2, (warned, stopped))
    directory.write_decisions(1, (warned,))
    record = read_run(directory)
    block = config_of(tmp_path).evaluation.model_copy(
        update={"metric_for_best_model": "kl", "greater_is_better": False}
    )
    config = record.config.model_copy(update={"guard": (stopped.rule,), "evaluation": block})
    assert verdict(replace(record, config=config)).outcomes == (
        "guard after round 1: kl_initial is 2.5, above 2: warning",
        "guard after round 2: kl_initial is 2.5, above 2: warning",
        "guard after round 2: length is 40, above 30: the run ends here",
        "ended after round 2: guard: length is 40, above 30",
        "best by kl: version 0 (0)",
    )
    assert verdict(read_run(save_run(tmp_path, STEADY, "plain"))).outcomes == ()


@pytest.mark.parametrize(("change", "told"), [(0.2, "rose"), (-0.2, "fell"), (0.0, "may be chance")])
def test_what_a_gold_scorer_says_is_told_prompt_by_prompt(tmp_path: Path, change: float, told: str) -> None:
    directory = save_run(tmp_path, STEADY)
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "Why?"},), (1, 2)) for i in range(20)]
    candidates = [Candidate(prompt.id, 0, (3,), (-0.5,), "text", "stop", 0, 7) for prompt in prompts]
    for index, gain in ((0, 0.0), (2, change)):
        golds = [0.1 + gain + 0.05 * (-1 if index and place % 2 else 0 if not index else 1) for place in range(20)]
        scores = [Score(0.5, {GOLD: gold}) for gold in golds]
        write_candidates(directory.round(index) / "samples.parquet", prompts, candidates, scores)
    (line,) = verdict(read_run(directory)).outcomes
    assert line.startswith(f"gold score: {change:+.3f} [") and f"({told}), by a scorer that no round trains on" in line


def test_commands_are_those_that_make_sense_next(tmp_path: Path) -> None:
    record = read_run(save_run(tmp_path, STEADY))
    assert list(record.commands) == ["resume", "report", "compare", "promote", "export"]
    done = record.config.model_copy(update={"schedule": config_of(tmp_path).schedule.model_copy(update={"rounds": 2})})
    assert list(replace(record, config=done).commands) == ["report", "compare", "promote", "export"]
    assert list(replace(record, reports=()).commands) == ["resume", "report"]
    reward_model = parse_tree({"recipe": "reward_model", "data": {"source": "rows.json"}}, RewardModelConfig, "config")
    chosen = config_of(tmp_path).evaluation.model_copy(update={"metric_for_best_model": "score"})
    best = replace(record, config=record.config.model_copy(update={"evaluation": chosen})).commands
    assert all("--version best" in best[name] for name in ("promote", "export"))
    assert "promote" not in replace(record, config=reward_model).commands


@pytest.mark.parametrize(("metric", "word"), [("loss", "worse"), ("rewards/accuracies", "better")])
def test_held_out_rows_are_judged_by_their_intervals_and_a_loss_by_its_fall(metric: str, word: str) -> None:
    def rows(value: float) -> HeldOutEvaluation:
        return HeldOutEvaluation(metric, value, value - 0.02, value + 0.02, 50, {"loss": 0.6})

    config = parse_tree({"recipe": "offline_dpo", "data": {"source": "rows.json"}}, OfflineDpoConfig, "config")
    report = RoundReport(1, 1, {"preferences": 9}, (), {}, rows(0.6), {})
    record = RunRecord(Path("runs/x"), config, rows(0.5), (report,), (), (), {}, ())
    assert verdict(record).word == word
    close = RoundReport(1, 1, {"preferences": 9}, (), {}, rows(0.52), {})
    assert verdict(RunRecord(Path("runs/x"), config, rows(0.5), (close,), (), (), {}, ())).word == "unclear"


def test_measures_that_are_absent_are_left_out() -> None:
    bare = Evaluation(0.2, 0.1, 0.3, None, 40.0, 0.8, 0.6, completions=4, unscored=0)
    assert [measure.name for measure in shown([bare])] == ["score", "length", "distinct_2", "eos_rate"]
    assert "kl_initial" not in {measure.name for measure in shown([evaluated(0.3)])}, "it is the KL shown"
    assert written(MEASURES[0], measured(bare)) == "0.200 [0.100, 0.300]"
    assert written(MEASURES[1], measured(bare)) == "-"


def test_charts_of_capability_are_one_a_task_and_the_rest_is_bookkeeping() -> None:
    sums = ("perplexity", "perplexity_change")
    others = (*(f"{name}{end}" for name in sums for end in ("_low", "_high")), "perplexity_nats_per_token")
    found = (*sums, *others)
    assert capability_chart("perplexity", found) == "eval/capability/perplexity"
    assert all(capability_chart(name, found) == f"run/capability/{name}" for name in (sums[1], *others))


def test_charts_begin_with_the_score_and_bookkeeping_stands_behind_trls() -> None:
    """MLflow sorts sections, all before the last slash, by name."""
    names = [chart_name(name) for name in measured(BASELINE)] + ["rewards/margins", "logps/chosen", "run/counts/ties"]
    sections = sorted({name.rpartition("/")[0] for name in names})
    assert sections == ["eval", "eval/drift", "eval/text", "logps", "rewards", "run/counts", "run/held_out"]
    first = [name for name in names if name.rpartition("/")[0] == "eval"]
    assert first[:3] == ["eval/score", "eval/score_low", "eval/score_high"]
    assert {name.removeprefix("eval/").removesuffix("_low").removesuffix("_high") for name in first} == {
        "score",
        "gold",
        "win_rate",
        "win_rate_length_controlled",
        "win_rate_previous",
    }
