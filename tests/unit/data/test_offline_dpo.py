"""Offline DPO from baseline to summary, and through the end of its process at any moment."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from raylign.config import OfflineDpoConfig, load_config
from raylign.config.offline import HeldOutBlock
from raylign.data.preferences import PreferenceData
from raylign.evaluation.held_out import HeldOut, held_out_evaluation
from raylign.records import Candidate, HeldOutEvaluation, Preference, Prompt
from raylign.run.directory import RunDirectory, continue_or_create
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.offline_dpo import train
from recipes.run import Run
from tests.fakes import CountingRank, Deadly, Killed, NoFeed, fake_trainers


def row(name: str, better: int, worse: int) -> Preference:
    """A pair whose answers have `better` and `worse` tokens."""
    prompt = Prompt(name, ({"role": "user", "content": name},), (1, 2))
    candidates = tuple(
        Candidate(name, index, (3,) * size, (), "text", "stop", 0, 0) for index, size in enumerate((better, worse))
    )
    return Preference(prompt, candidates, (1.0, 0.0), (1.0, 1.0))


DATA = PreferenceData(
    train=tuple(row(f"t{index}", 3, 1) for index in range(4)),
    held_out=(row("h0", 3, 1), row("h1", 1, 3), row("h2", 2, 1)),
    source="here.jsonl",
    digest="00",
    invalid=(),
    counts={},
)


def config_in(folder: Path, **more: Any) -> OfflineDpoConfig:
    raw = {
        "recipe": "offline_dpo",
        "run": {"dir": str(folder / "runs")},
        "data": {"source": "here.jsonl"},
        "trainer": {"per_device_train_batch_size": 1},
        "schedule": {"num_train_epochs": 2, "rounds_per_epoch": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | more))
    return load_config(folder / "recipe.yaml", kind=OfflineDpoConfig)


def run_once(folder: Path, last: int = 10_000, **more: Any) -> tuple[Deadly, RunDirectory, str]:
    """One process with fresh trainers on the run directory; it lives for `last` events."""
    config, events, output = config_in(folder, **more), Deadly(last), io.StringIO()
    directory = continue_or_create(config)
    with Journal(directory.path / JOURNAL_NAME) as journal:
        run = Run(config, directory, Tracker(journal, NoFeed()), Console(file=output, width=200))
        run.open_record(DATA, "train")
        trainers = fake_trainers(CountingRank(events, config), config)
        try:
            run.restore(trainers)
            train(run, DATA, trainers, config)
        except Killed:
            return events, directory, output.getvalue()
        run.summary()
    return events, directory, output.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deadly, RunDirectory, str]:
    return run_once(tmp_path_factory.mktemp("whole"))


def test_rounds_train_on_their_rows_and_evaluate(whole: tuple[Deadly, RunDirectory, str]) -> None:
    events, directory, output = whole
    assert events[:2] == ["reference 3 seed 0 after 0 rounds", "evaluate 3"]
    assert events[2:8] == [
        *["reference 2 seed 1 after 0 rounds", "train 2 seed 1", "step", "step"],
        *["save weights", "evaluate 3"],
    ]
    reports = directory.reports()
    assert [report.policy_version for report in reports] == [1, 2, 3, 4]
    assert [report.counts for report in reports] == [{"preferences": 2}] * 4
    rows = [pq.read_table(directory.round(index) / "preferences.parquet").to_pylist() for index in (1, 2, 3, 4)]
    for epoch in (rows[:2], rows[2:]):
        assert sorted(one["prompt_id"] for part in epoch for one in part) == ["t0", "t1", "t2", "t3"]
    assert "results:" in output and "held-out rewards/accuracies" in output


def test_later_epochs_measure_only_a_reference_that_moves(
    whole: tuple[Deadly, RunDirectory, str], tmp_path: Path
) -> None:
    asked = ["reference 2 seed 1 after 0 rounds", "reference 2 seed 2 after 1 rounds"]
    assert [event for event in whole[0] if event.startswith("reference 2")] == asked
    moving, _, _ = run_once(tmp_path, reference={"policy": "previous_round"})
    asked += ["reference 2 seed 3 after 2 rounds", "reference 2 seed 4 after 3 rounds"]
    assert [event for event in moving if event.startswith("reference 2")] == asked


def test_the_untrained_policy_ranks_like_a_coin(whole: tuple[Deadly, RunDirectory, str]) -> None:
    """Version 1 likes long answers: it ranks h0 and h2 rightly and h1 wrongly."""
    directory = whole[1]
    baseline, first = directory.baseline(), directory.reports()[0].evaluation
    assert isinstance(baseline, HeldOutEvaluation) and isinstance(first, HeldOutEvaluation)
    assert (baseline.value, baseline.rows) == (0.5, 3) and 0 < baseline.low < 0.5 < baseline.high < 1
    assert baseline.metrics["loss"] == pytest.approx(0.6931472)
    assert first.value == pytest.approx(2 / 3) and first.low <= first.value <= first.high


def test_what_the_journal_has(whole: tuple[Deadly, RunDirectory, str]) -> None:
    events = list(read_events(whole[1].path / JOURNAL_NAME))
    (baseline,) = [event.payload["evaluation"] for event in events if event.name == "evaluation"]
    assert {"loss", "rewards/accuracies", "rewards/accuracies_low", "rows"} <= baseline.keys()
    assert [event.payload["round"] for event in events if event.name == "round_finished"] == [1, 2, 3, 4]


def tables(directory: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    return {str(p.relative_to(directory.path)): pq.read_table(p).to_pylist() for p in directory.path.rglob("*.parquet")}


def came_to(directory: RunDirectory) -> Iterator[dict[str, Any]]:
    return ({**asdict(report), "seconds": sorted(report.seconds)} for report in directory.reports())


@pytest.mark.parametrize("last", range(0, 34, 3))
def test_it_ends_as_if_it_had_not_been_killed(
    last: int, whole: tuple[Deadly, RunDirectory, str], tmp_path: Path
) -> None:
    first, _, _ = run_once(tmp_path, last)
    second, directory, _ = run_once(tmp_path)
    assert list(came_to(directory)) == list(came_to(whole[1])) and tables(directory) == tables(whole[1])
    assert [p.name for p in directory.checkpoints()] == [p.name for p in whole[1].checkpoints()]
    assert json.loads((directory.round(0) / "report.json").read_text())["evaluation"]["value"] == 0.5
    assert first.count("step") + second.count("step") <= whole[0].count("step") + 2


def test_the_interval_is_over_rows() -> None:
    measured = HeldOut({"loss": 0.5}, (0.5,) * 8, (1.0,) * 6 + (0.0, 0.0), (0.0,) * 6 + (0.0, 1.0))
    found = held_out_evaluation(measured, "rewards/accuracies", HeldOutBlock(), seed=1)
    assert found.value == 6.5 / 8 and 0.4 < found.low < found.value < found.high <= 1.0
    by_loss = held_out_evaluation(measured, "loss", HeldOutBlock(), seed=1, more={"extra": 2.0})
    assert (by_loss.value, by_loss.low, by_loss.high) == (0.5, 0.5, 0.5) and by_loss.metrics["extra"] == 2.0
