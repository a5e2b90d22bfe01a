"""What a run of the recipe `evaluate` shows: who won, on which prompts, and what to do with it."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from raylign.config import EvaluateConfig
from raylign.config.load import parse_tree
from raylign.evaluation.comparison import Comparison, Opponent
from raylign.evaluation.win_rate import WinRate
from raylign.records import Candidate, Prompt, Score
from raylign.report.figures import pictures
from raylign.report.page import description, report_page
from raylign.report.record import read_run
from raylign.report.verdict import Word, verdict
from raylign.run.directory import RunDirectory, create_run
from raylign.run.tables import write_candidates
from raylign.tracking.artifacts import dataset_input
from raylign.tracking.facts import publishable
from raylign.tracking.presented import tags_of
from recipes.commands.review import show_run
from tests.unit.report.run_records import BASELINE

WON = WinRate(0.75, 0.6, 0.85, 0.7, 0.1, 0.2, 0.74, 0.6, 0.85, 40)
PART = replace(WON, rate=0.5, low=0.3, high=0.7, prompts=20)
POLICY = {"type": "run", "run": "runs/reviews", "version": 3}
CATEGORY = "$math|</td>"


def found(won: WinRate = WON) -> Comparison:
    own = replace(BASELINE, win_rate=won.rate, win_rate_low=won.low, win_rate_high=won.high)
    first = Opponent("version 0 of runs/reviews", won, {CATEGORY: PART})
    opponents = {"initial": first, "other": Opponent("exported", PART, {})}
    return Comparison("version 3 of runs/reviews", "module:score", 40, 0.95, own, opponents)


def save_evaluation(parent: Path, comparison: Comparison | None, judge: bool = False) -> RunDirectory:
    scoring = {"type": "judge", "base_url": "http://127.0.0.1:1/v1", "model": "m"} if judge else {}
    raw = {"recipe": "evaluate", "run": {"dir": str(parent), "name": "held"}, "policy": POLICY}
    config = parse_tree(raw | ({"scoring": scoring} if judge else {}), EvaluateConfig, "test")
    directory = create_run(config.run, config)
    directory.write_baseline(BASELINE)
    prompt = Prompt("p0", ({"role": "user", "content": "Why?"},), (1, 2))
    for name, text, score in (("candidates", "of the policy", 0.9), ("candidates-1", "of the opponent", 0.1)):
        candidate = Candidate("p0", 0, (3,), (-0.5,), text, "stop", 0, 7)
        write_candidates(directory.round(0) / f"{name}.parquet", [prompt], [candidate], [Score(score)])
    if comparison is not None:
        (directory.path / "report.json").write_bytes(TypeAdapter(Comparison).dump_json(comparison))
    return directory


@pytest.mark.parametrize(
    ("won", "word", "opening"),
    [
        (WON, "better", "Better: version 3 of runs/reviews has a win rate of 0.750 [0.600, 0.850] over version 0"),
        (PART, "unclear", "No clear difference: "),
        (replace(PART, rate=0.2, low=0.1, high=0.4), "worse", "Worse: "),
    ],
)
def test_the_verdict_is_the_win_rate_over_the_first_opponent(
    tmp_path: Path, won: WinRate, word: Word, opening: str
) -> None:
    told = verdict(read_run(save_evaluation(tmp_path, found(won))))
    assert told.word == word and told.sentence.startswith(opening)
    assert f"by module:score (95% interval, {won.prompts} prompts, ties are half a win)" in told.sentence


def test_prompts_that_were_left_out_are_told(tmp_path: Path) -> None:
    told = verdict(read_run(save_evaluation(tmp_path, found(replace(WON, missing=3)))))
    assert told.notes == ("3 prompts have no scored answer of both sides and are left out",)


def test_the_description_has_a_row_for_each_opponent_and_category_and_the_way_to_the_champion(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, found()))
    text = description(record, verdict(record), "FINISHED", None)
    rows = [line.replace("\u00a0", " ").split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows == ["opponent", "---", "initial", "· $math\\", "other"]
    assert "model **runs/reviews**" in text and "rounds" not in text and "\n\nfinished.\n" in text
    assert f"raylign promote runs/reviews --version 3 --evaluation {tmp_path / 'held'}" in text


def test_the_report_has_both_answers_beside_each_other_and_one_figure(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, found()))
    drawn = pictures(record)
    assert [one.name for one in drawn] == ["win_rates"]
    page = report_page(record, verdict(record), drawn)
    assert "<h2>Win rates</h2>" in page and "Held-out answers of initial and of the policy" in page
    assert page.index("of initial, score 0.100") < page.index("of the policy, score 0.900")
    assert CATEGORY not in page and "$math|&lt;/td&gt;" in page


def test_answers_that_a_judge_saw_two_at_a_time_have_no_score_of_their_own_to_show(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, found(), judge=True))
    assert record.before == record.after == ()
    assert "Held-out answers" not in report_page(record, verdict(record), ())


def test_an_unfinished_comparison_says_so_and_how_it_goes_on(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, None))
    told = verdict(record)
    assert (told.word, told.sentence) == ("untrained", "Nothing to tell yet: the comparison is not finished.")
    assert list(record.commands) == ["resume"]


def test_a_model_that_is_no_runs_policy_has_nothing_to_promote(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, replace(found(), policy="exported")))
    assert list(record.commands) == ["report"]


def test_its_tags_name_the_policy_and_no_model_that_nobody_evaluated(tmp_path: Path) -> None:
    record = read_run(save_evaluation(tmp_path, found()))
    assert tags_of(publishable(record.config.model_dump(mode="json")), {})["model"] == "runs/reviews"


def test_show_prints_the_table_of_win_rates(tmp_path: Path) -> None:
    directory = save_evaluation(tmp_path, found())
    console = Console(record=True, width=80)
    file = show_run(directory.path, None, console)
    text = console.export_text()
    assert text.startswith("Better: ") and "75.0 [60.0, 85.0]" in text and f"--evaluation {directory.path}" in text
    assert file.read_text().count("data:image/png;base64,") == 1


@pytest.mark.parametrize(("train", "context"), [(0, "evaluation"), (96, "training")])
def test_prompts_that_nobody_trains_on_are_for_evaluation(train: int, context: str) -> None:
    found = dataset_input("prompts", "ab" * 32, "local", {"uri": "x.jsonl"}, {"train": train, "held_out": 24})
    assert {tag.key: tag.value for tag in found.tags}["mlflow.data.context"] == context
