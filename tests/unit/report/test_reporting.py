"""Tables, samples, notes and progress as people see them."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType
from scipy.stats import chi2_contingency

from raylign.config.evaluation import EvaluationBlock
from raylign.records import Evaluation, Prompt, RoundReport, Score
from raylign.report.console import stage_progress
from raylign.report.summary import alignment_tax, headline
from raylign.report.tables import STAGES, Sample, report_console, round_table, samples_block, warnings
from raylign.report.text import escape_control

BASELINE = Evaluation(
    score=0.1,
    score_low=0.0,
    score_high=0.2,
    kl=0.0,
    length=40.0,
    distinct_2=0.8,
    eos_rate=0.6,
    completions=32,
    unscored=0,
    kl_initial=0.0,
)
BETTER = replace(BASELINE, score=0.5, score_low=0.4, score_high=0.6, kl=2.5, kl_initial=2.5)
STEPS = (
    {"loss": 0.6931, "rewards/accuracies": 0.0, "rewards/margins": 0.0},
    {"loss": 0.5, "rewards/accuracies": 0.9, "rewards/margins": 0.3},
)


def report(index: int, evaluation: Evaluation = BETTER, accuracy: float = 0.8) -> RoundReport:
    steps = (*STEPS[:1], {"loss": 0.5, "rewards/accuracies": accuracy, "rewards/margins": 0.3})
    seconds = {stage: 98.0 + number for number, stage in enumerate(STAGES)}
    return RoundReport(index, index, {"preferences": 47}, steps, {}, evaluation, seconds)


def settled(index: int, evaluation: Evaluation = BETTER, accuracy: float = 0.8) -> RoundReport:
    """A round whose every step has the same accuracy."""
    full = report(index, evaluation)
    return replace(full, steps=({"loss": 0.5, "rewards/accuracies": accuracy, "rewards/margins": 0.3},))


def rendered(renderable: RenderableType, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue()


def test_the_table_has_a_row_per_evaluation_and_fits_140_columns() -> None:
    start = replace(BASELINE, score=-0.1, score_low=-0.3, score_high=-0.2)
    lines = [line.split() for line in rendered(round_table(start, [report(1), report(2)]), 140).splitlines() if line]
    rows = [line for line in lines if line and line[0] in "012"]
    assert rows[0] == ["0", "-0.100", "[-0.300,", "-0.200]", "0.00", "40.0", "0.800", "0.60"] + ["-"] * 11
    seconds = ["98.0", "99.0", "100", "101", "102", "103", "104"]
    expected = [
        "0.500",
        "[0.400,",
        "0.600]",
        "2.50",
        "40.0",
        "0.800",
        "0.60",
        "47",
        "0.693",
        "0.40",
        "0.150",
        *seconds,
    ]
    assert rows[1:] == [["1", *expected], ["2", *expected]]


def test_what_rounds_to_nothing_has_no_sign() -> None:
    start = replace(BASELINE, score=-0.0001, score_low=-0.0004, gold=-0.0002, kl=-0.001)
    assert headline(start) == "held-out score 0.000, gold 0.000, KL 0.00 nats, 0.00 to the initial policy"
    assert "-0.00" not in rendered(round_table(start, []))


def test_a_narrow_console_has_the_groups_of_columns_below_each_other() -> None:
    table = round_table(BETTER, [report(1)])
    narrow = rendered(table, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    lines = [line.split() for line in narrow.splitlines()]
    (measured, training, seconds) = [line[1:] for line in lines if line[:1] == ["1"]]
    whole = next(line.split() for line in rendered(table, 140).splitlines() if line.split()[:1] == ["1"])
    assert [*measured, *training, *seconds] == whole[1:]
    assert all(word in narrow for word in ("[low, high]", "accuracies", *STAGES)), "heads are not folded"


def test_the_table_head_names_every_column() -> None:
    text = rendered(round_table(BASELINE, []), 140)
    assert "…" not in text
    assert all(word in text for word in ("[low, high]", "distinct", "accuracies", "margins", "EOS", *STAGES))


def test_a_round_without_steps_or_times_shows_dashes() -> None:
    bare = replace(report(1), steps=(), seconds={})
    (row,) = [line for line in rendered(round_table(BASELINE, [bare])).splitlines() if line.split()[:1] == ["1"]]
    assert row.split()[-11:] == ["47"] + ["-"] * 10


def scored(version: int, score: float, capability: dict[str, float]) -> RoundReport:
    return report(version, replace(BETTER, score=score, capability=capability))


def test_the_alignment_tax_is_a_line_with_paired_intervals() -> None:
    before = replace(BETTER, capability={"multiple_choice": 0.41, "multiple_choice_low": 0.3, "perplexity": 12.1})
    after = {"multiple_choice": 0.4, "multiple_choice_low": 0.3, "perplexity": 12.4, "perplexity_nats_per_token": 2.5}
    change = {"_change": -0.01, "_change_low": -0.04, "_change_high": 0.02}
    after |= {f"multiple_choice{name}": value for name, value in change.items()}
    after |= {f"perplexity{name}": -30 * value for name, value in change.items()}
    told = (
        "multiple choice 0.410 -> 0.400 (-0.010, -0.040 to +0.020), perplexity 12.10 -> 12.40 (+0.30, +1.20 to -0.60)"
    )
    first, second, bare = scored(1, 0.3, after), scored(2, 0.2, after), scored(3, 0.1, {})
    assert alignment_tax(before, [first]) == [f"alignment tax: {told}"]
    assert alignment_tax(before, [first, bare]) == [f"alignment tax of version 1: {told}"]
    assert alignment_tax(BETTER, [first]) == [] and alignment_tax(before, [bare]) == []
    best = EvaluationBlock(metric_for_best_model="score")
    assert alignment_tax(replace(before, score=0.0), [first, second], best) == [
        f"alignment tax of version 2: {told}",
        f"alignment tax of version 1, the best: {told}",
    ]
    assert alignment_tax(replace(before, score=0.0), [scored(1, 0.3, {}), second], best) == [
        f"alignment tax of version 2: {told}; of version 1, the best, it was not measured "
        "(evaluation.capability.every=1 measures every round)"
    ]
    assert alignment_tax(before, [first, second], best) == [f"alignment tax of version 2: {told}"], "0 is the best"
    assert headline(before).endswith(" nats, multiple choice 0.410")


def test_a_kl_that_was_not_measured_is_a_dash_and_no_note() -> None:
    lines = rendered(round_table(replace(BASELINE, kl=None, kl_initial=None), [])).splitlines()
    (row,) = [line.split() for line in lines if line.split()[:1] == ["0"]]
    assert row[3:5] == ["0.200]", "-"]
    assert warnings(BASELINE, [settled(1), settled(2, replace(BETTER, kl=None))]) == []


def test_kl_to_the_initial_policy_has_a_column_where_it_is_another_one() -> None:
    moved = replace(BETTER, kl=0.5, kl_initial=11.25)
    plain, apart = (rendered(round_table(BASELINE, [report(1, one)]), 160) for one in (BETTER, moved))
    assert "initial" in apart and "initial" not in plain
    (row,) = [line.split() for line in apart.splitlines() if line.split()[:1] == ["1"]]
    assert row[3:7] == ["0.600]", "0.50", "11.25", "40.0"]
    assert headline(moved) == "held-out score 0.500, KL 0.50 nats, 11.25 to the initial policy"
    assert headline(BETTER) == "held-out score 0.500, KL 2.50 nats"


def test_drift_past_a_moving_reference_is_noted() -> None:
    """Six rounds of 2 nats each are 12 from where the run began."""
    (note,) = warnings(BASELINE, [settled(1), settled(2, replace(BETTER, kl=2.0, kl_initial=12.0))])
    assert note.startswith("KL to the initial policy is 12.0 nats per completion (noted above 10)")


def test_a_kl_to_the_initial_policy_that_cannot_be_had_is_said() -> None:
    far = replace(BETTER, kl=12.0, kl_initial=None)
    unknown, note = warnings(BASELINE, [settled(1), settled(2, far)])
    assert unknown.startswith("KL to the initial policy is not known") and "set reference.policy=initial" in unknown
    assert note.startswith("KL to the reference is 12.0 nats")


WON = replace(BETTER, win_rate=0.7, win_rate_low=0.6, win_rate_high=0.8)


def controlled(rate: float, low: float) -> Evaluation:
    return replace(WON, win_rate_length_controlled=rate, win_rate_length_controlled_low=low)


def test_win_rates_have_a_column_where_versions_were_compared() -> None:
    plain, compared = (rendered(round_table(BASELINE, [report(1, one)]), 160) for one in (BETTER, WON))
    assert "win rate" in compared and "win rate" not in plain
    rows = [line.split() for line in compared.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [row[4:6] for row in rows] == [["-", "0.00"], ["70", "[60-80]"]]
    assert headline(WON).endswith(", KL 2.50 nats, win rate 0.70")


def test_means_that_may_be_chance_are_noted_unless_prompts_say_otherwise() -> None:
    same = replace(BASELINE, win_rate=0.6, win_rate_low=0.45, win_rate_high=0.75)
    (note,) = warnings(BASELINE, [settled(1), settled(2, same)])
    assert "the intervals overlap, so the change may be chance" in note
    assert warnings(BASELINE, [settled(1), settled(2, same)], sure=True) == []
    assert warnings(BASELINE, [settled(1), settled(2, replace(same, win_rate_low=0.51))]) == []
    assert warnings(BASELINE, [settled(1), settled(2, replace(same, win_rate_low=0.2, win_rate_high=0.4))]) == []


def test_a_win_rate_that_length_explains_is_noted() -> None:
    assert warnings(BASELINE, [settled(1), settled(2, controlled(0.65, 0.55))]) == []
    assert warnings(BASELINE, [settled(1), settled(2, controlled(0.69, 0.48))]) == [], "the same, less surely"
    (note,) = warnings(BASELINE, [settled(1), settled(2, controlled(0.52, 0.41))])
    assert note.startswith(
        "the win rate over the initial policy is 0.70, and at equal lengths 0.52, which may be chance"
    )


def sample(completion: str, value: float | None, name: str = "p1") -> Sample:
    messages = ({"role": "system", "content": "sys"}, {"role": "user", "content": "the question"})
    return Sample(Prompt(name, messages, (1,)), completion, Score(value, reason="late" if value is None else ""))


def test_samples_show_question_answers_and_scores_as_plain_text() -> None:
    before, after = sample("[bold]x[/bold] \x1b[31mred\r\nnext", 0.25), sample("great " * 3, None)
    text = rendered(samples_block("round 0 and round 5", [before], [after]))
    lines = [line.strip() for line in text.splitlines()]
    assert "the question" in lines
    assert "before, score 0.250" in lines and "after, score none (late)" in lines
    assert r"[bold]x[/bold] \x1b[31mred\r" in lines and "next" in lines
    assert "\x1b" not in text


def test_long_completions_are_cut_and_say_so() -> None:
    block = samples_block("t", [sample("a" * 1300, 0.0)], [sample("b", 0.0)])
    assert "... (100 more characters)" in rendered(block).replace("\n", " ").replace("  ", " ")


def test_samples_of_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same prompts"):
        samples_block("t", [sample("a", 0.0, "p1")], [sample("a", 0.0, "p2")])


def test_a_healthy_campaign_has_no_notes() -> None:
    assert warnings(BASELINE, []) == []
    assert warnings(BASELINE, [report(1), settled(2)]) == []


def changed(change: dict[str, Any]) -> Evaluation:
    return replace(BETTER, **change)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"distinct_2": 0.3}, "distinct-2 fell from 0.80 to 0.30 (-62%)"),
        ({"eos_rate": 0.2}, "EOS rate fell from 0.60 to 0.20 (-67%)"),
        ({"length": 61.0}, "mean length went from 40.0 to 61.0 tokens (+52%)"),
        ({"length": 19.0}, "mean length went from 40.0 to 19.0 tokens (-52%)"),
        ({"kl": 12.34}, "KL to the reference is 12.3 nats per completion (noted above 10)"),
        (
            {"score": 0.15, "score_low": 0.05, "score_high": 0.25},
            "score went from 0.100 [0.000, 0.200] to 0.150 [0.050, 0.250]",
        ),
    ],
)
def test_each_sign_has_its_note_with_numbers(change: dict[str, float], note: str) -> None:
    (found,) = warnings(BASELINE, [settled(1), settled(2, changed(change))])
    assert found.startswith(note)


@pytest.mark.parametrize("change", [{"distinct_2": 0.4}, {"eos_rate": 0.3}, {"length": 60.0}, {"kl": 10.0}])
def test_the_limits_themselves_are_allowed(change: dict[str, float]) -> None:
    assert warnings(BASELINE, [settled(1), settled(2, changed(change))]) == []


@pytest.mark.parametrize(("before", "after", "of"), [(4, 1, 24), (40, 10, 240), (9, 2, 24), (12, 4, 24), (12, 5, 24)])
def test_a_fall_of_the_eos_rate_is_noted_where_scipy_too_calls_it_no_chance(before: int, after: int, of: int) -> None:
    table = [[before, of - before], [after, of - after]]
    sure = chi2_contingency(table, correction=False).pvalue < 0.05
    start = replace(BASELINE, eos_rate=before / of, completions=of)
    last = replace(BETTER, eos_rate=after / of, completions=of)
    found = [note for note in warnings(start, [settled(1), settled(2, last)]) if note.startswith("EOS rate")]
    assert len(found) == sure


def test_the_table_has_a_column_for_every_stage_that_took_time() -> None:
    long = replace(report(1), seconds={"sample": 3.0, "sample-1": 1.0, "capability": 124.0})
    text = rendered(round_table(BASELINE, [long]), 160)
    assert "capability" in text and "sample-1" in text
    assert next(line.split() for line in text.splitlines() if line.split()[:1] == ["1"])[-2:] == ["1.0", "124"]


def test_flat_accuracy_is_noted_from_the_second_round_on() -> None:
    assert warnings(BASELINE, [settled(1, accuracy=0.5)]) == []
    (note,) = warnings(BASELINE, [settled(1), settled(2, accuracy=0.5)])
    assert note.startswith("rewards/accuracies is 0.50 in round 2 (noted below 0.55")


def test_reports_are_wide_enough_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_console().width == 160


def test_escape_control_keeps_scripts_and_writes_out_the_rest() -> None:
    assert escape_control("né\u3000\u200c日\U0001f468\u200d\U0001f469") == "né\u3000\u200c日\U0001f468\u200d\U0001f469"
    assert escape_control("a\tb\n\x9b\u202e\ud800", keep="\n") == "a\\tb\n\\x9b\\u202e\\ud800"


def test_progress_off_a_terminal_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0, 12.5])
    monkeypatch.setattr("raylign.report.console.time.monotonic", lambda: next(clock))
    file = io.StringIO()
    with stage_progress(Console(file=file), "sample", total=48) as advance:
        for finished in (6, 6, 24, 12):
            advance(finished)
    assert file.getvalue() == "sample 12/48 prompts\nsample 48/48 prompts in 12.5 s\n"


def test_an_interrupted_stage_says_how_far_it_came() -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), stage_progress(Console(file=file), "train", 4, unit="steps") as advance:
        advance(3)
        raise KeyboardInterrupt
    assert file.getvalue().startswith("train 3/4 steps in ")


def test_progress_on_a_terminal_is_a_bar() -> None:
    file = io.StringIO()
    with stage_progress(Console(file=file, force_terminal=True, width=100), "score", total=2) as advance:
        advance(2)
    assert "2/2" in file.getvalue() and "━" in file.getvalue()
