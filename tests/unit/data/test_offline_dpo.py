"""Offline DPO from baseline to summary, and through the end of its process at any moment."""

import io
import json
from collections.abc import Iterator, Sequence
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
from raylign.run.checkpoints import Metrics
from raylign.run.directory import RunDirectory, continue_or_create
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.commands.export import best_of
from recipes.offline_dpo import train
from recipes.run import Run, finished_before
from tests.fakes import CountingRank, Deadly, Killed, NoFeed, fake_trainers
from tests.unit.run.test_resume import TASKS


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


class Falling(CountingRank):
    """Both answers get less likely, by 3 and by 5 nats times the round's number; says which beta it works with."""

    @property
    def beta(self) -> float:
        return float(self._loss.beta)

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        self._events.append(f"round {rounds_done + 1} with beta {self.beta:g}")
        return super().begin_round(preferences, seed, rounds_done, steps)

    def train_step(self) -> Metrics:
        fallen = self.beta * (self.version + 1)
        report = dict(super().train_step())
        self._reports[-1] = report | {"rewards/chosen": -3.0 * fallen, "rewards/rejected": -5.0 * fallen}
        return self._reports[-1]

    def evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        self._events.append(f"evaluate with beta {self.beta:g}")
        return super().evaluate(preferences)


def run_once(
    folder: Path, last: int = 10_000, rank: type[CountingRank] = CountingRank, **more: Any
) -> tuple[Deadly, RunDirectory, str]:
    """One process with fresh trainers on the run directory; it lives for `last` events."""
    config, events, output = config_in(folder, **more), Deadly(last), io.StringIO()
    directory = continue_or_create(config)
    with Journal(directory.path / JOURNAL_NAME) as journal:
        run = Run(config, directory, Tracker(journal, NoFeed()), Console(file=output, width=200), TASKS)
        run.open_record(DATA, "train")
        trainers = fake_trainers(rank(events, config), config)
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


RAISING: dict[str, Any] = {
    "guard": [
        {"measure": "displacement", "above": 5.0, "action": "raise_beta"},
        {"measure": "rewards/accuracies", "below": 0.6, "action": "warn"},
    ]
}


def betas(events: Sequence[str]) -> dict[str, str]:
    return dict(event.split(" with beta ") for event in events if event.startswith("round "))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deadly, RunDirectory, str]:
    return run_once(tmp_path_factory.mktemp("guarded"), rank=Falling, **RAISING)


def test_displacement_raises_beta_and_versions_are_still_evaluated_alike(
    guarded: tuple[Deadly, RunDirectory, str],
) -> None:
    """3, 6, 9 and 12 nats after rounds 1 to 4."""
    events, directory, output = guarded
    assert betas(events) == {"round 1": "0.1", "round 2": "0.1", "round 3": "0.2", "round 4": "0.4"}
    assert {event for event in events if event.startswith("evaluate with")} == {"evaluate with beta 0.1"}
    health = [report.health for report in directory.reports()]
    assert [own["logps/displacement"] for own in health] == pytest.approx([3.0, 6.0, 9.0, 12.0])
    assert [own["beta"] for own in health] == pytest.approx([0.1, 0.1, 0.2, 0.4])
    assert "round 2: guard: displacement is 6, above 5: loss.beta x 2 from the next round on" in output
    assert "chosen and rejected answers both fell below the reference's, by 12.0 and 20.0 nats in round 4" in output
    assert [decision.rule.measure for decision in directory.decisions(1) or ()] == []


@pytest.mark.parametrize("last", range(3, 52, 4))
def test_a_guarded_run_that_was_killed_ends_the_same(
    last: int, guarded: tuple[Deadly, RunDirectory, str], tmp_path: Path
) -> None:
    first, _, _ = run_once(tmp_path, last, rank=Falling, **RAISING)
    second, directory, _ = run_once(tmp_path, rank=Falling, **RAISING)
    assert list(came_to(directory)) == list(came_to(guarded[1]))
    assert betas([*first, *second]) == betas(guarded[0])


def test_the_run_ends_without_a_better_version_and_keeps_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every version from 1 on ranks two of three rows rightly."""
    block = {"metric_for_best_model": "rewards/accuracies", "early_stopping_patience": 2, "capability": {}}
    options: dict[str, Any] = {"evaluation": block, "trainer": {"save_total_limit": 1}}
    events, directory, output = run_once(tmp_path, **options)
    config = config_in(tmp_path, **options)
    assert directory.rounds_finished() == 3 and best_of(directory, config) == 1
    assert [path.name for path in directory.checkpoints()] == ["0001", "0003"]
    assert "ended after round 3: early stopping: rewards/accuracies was best after round 1 (0.6667)" in output
    assert finished_before(config) is not None and "the run has ended early, early stopping" in capsys.readouterr().out
    asked = [event for event in events if event.startswith("policy log-probs")]
    assert [event.rpartition(" ")[2] for event in asked] == ["0", "0", "3", "3"], "capability of the last version"
    assert "alignment tax of version 3:" in output


def test_a_stop_ends_it(tmp_path: Path) -> None:
    stop = {"measure": "displacement", "above": 5.0, "action": "stop"}
    _, directory, output = run_once(tmp_path, rank=Falling, guard=[stop])
    assert directory.rounds_finished() == 2 and "ended after round 2: guard: displacement is 6, above 5" in output


def test_the_interval_is_over_rows() -> None:
    measured = HeldOut({"loss": 0.5}, (0.5,) * 8, (1.0,) * 6 + (0.0, 0.0), (0.0,) * 6 + (0.0, 1.0))
    found = held_out_evaluation(measured, "rewards/accuracies", HeldOutBlock(), seed=1)
    assert found.value == 6.5 / 8 and 0.4 < found.low < found.value < found.high <= 1.0
    by_loss = held_out_evaluation(measured, "loss", HeldOutBlock(), seed=1, more={"extra": 2.0})
    assert (by_loss.value, by_loss.low, by_loss.high) == (0.5, 0.5, 0.5) and by_loss.metrics["extra"] == 2.0
