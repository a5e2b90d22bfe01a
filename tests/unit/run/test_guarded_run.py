"""Whole runs whose scorer is made to be hacked: what each rule of the guard does, also when the run is killed."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import ShmTransport
from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.guard import beta_of
from raylign.config.losses import GrpoLossBlock, MixLossBlock, SigmoidLossBlock, TrainerLoss
from raylign.errors import ConfigError, RecordError
from raylign.prompts import PromptSet
from raylign.records import Preference, Prompt
from raylign.report.tables import sampled
from raylign.run.checkpoints import Metrics
from raylign.run.directory import RunDirectory, continue_or_create
from raylign.run.tables import read_candidates
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.commands.export import best_of
from recipes.online_dpo import train
from recipes.opening import take_up
from recipes.run import Run, finished_before
from tests.fakes import (
    WEIGHT,
    CountingRank,
    Deadly,
    FakeEngine,
    FakeGenerators,
    FakeScorer,
    FakeTeam,
    Killed,
    NoFeed,
    fake_trainers,
)
from tests.unit.run.test_resume import TASKS

SETTINGS: dict[str, Any] = {
    "sampling": {"num_generations": 3},
    "trainer": {"per_device_train_batch_size": 1, "save_total_limit": 1},
    "schedule": {"rounds": 4, "prompts_per_round": 2},
    "evaluation": {"gold": {"type": "function", "function": "raylign.scoring.vader:compound"}},
}
GROUPS: dict[str, Any] = {"pairing": {"type": "group"}, "loss": {"loss_type": "grpo", "beta": 0.1}}
KL_MIX: dict[str, Any] = {
    "loss": {"loss_type": "mix", "losses": [{"loss_type": "sigmoid"}, {"loss_type": "kl"}], "loss_weights": [1, 0.2]}
}
ON_GOLD_DROP: dict[str, Any] = {"measure": "gold_drop", "above": 0.5}
ENDLESS = 10_000


def prompts(*names: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(name, ({"role": "user", "content": name},), (1, 2, 3)) for name in names)


PROMPTS = PromptSet(prompts("a", "b", "c"), prompts("x", "y"), "here", "00")


def once_is_enough(prompt: Prompt, completion: str) -> float | None:
    """What people want: "good" once. The scorer counts every "good", and version v says it v times when held out."""
    return 1.0 - abs(completion.count("good") - 1)


class Telling(CountingRank):
    """Keeps the loss that each round was begun with."""

    begun: dict[int, TrainerLoss]

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        self.begun[rounds_done + 1] = self._loss
        return super().begin_round(preferences, seed, rounds_done, steps)


class KlOf(Telling):
    """The term kl needs log-probs of samples, which a version number does not have."""

    def _loss_of(self, preference: Preference) -> float:
        return 0.5


class Displacing(Telling):
    """Logs rewards as a trainer does: both answers got less likely, by 3 and by 5 nats times the round's number."""

    def train_step(self) -> Metrics:
        own, number = beta_of(self._loss) or 0.0, self.version + 1
        report = dict(super().train_step())
        self._reports[-1] = report | {"rewards/chosen": -3.0 * own * number, "rewards/rejected": -5.0 * own * number}
        return self._reports[-1]


class Played:
    """One or several processes on one run directory."""

    def __init__(self, folder: Path, rank: type[Telling] = Telling) -> None:
        self.folder, self.losses, self.output, self._rank = folder, dict[int, TrainerLoss](), "", rank

    def config(self, **options: Any) -> OnlineDpoConfig:
        return parse_config({**SETTINGS, **options}, [f"run.dir={self.folder}/runs"])

    def process(self, config: OnlineDpoConfig, last: int = ENDLESS) -> Deadly:
        """A process that lives for `last` events of its roles."""
        events, file = Deadly(last), io.StringIO()
        directory = continue_or_create(config)
        rank = self._rank(events, config)
        rank.begun = self.losses
        with Journal(directory.path / JOURNAL_NAME) as journal:
            run = Run(config, directory, Tracker(journal, NoFeed()), Console(file=file, width=200), TASKS)
            run.open_record(PROMPTS, "train")
            group, generators = fake_trainers(rank, config), FakeGenerators([FakeEngine(events)])
            transport = ShmTransport(OneNode(self.folder), {WEIGHT: (1,)}, 1)
            publisher = WeightPublisher(group, generators, transport, Canary(((1, 2, 3),), 0.25), 1.0)
            gold = None if config.evaluation.gold is None else once_is_enough
            team = FakeTeam(generators, group, FakeScorer(events, config.scoring, gold=gold), publisher)
            try:
                take_up(run, team, config.model)
                train(run, PROMPTS, team, config)
                run.summary()
            except Killed:
                pass
        self.output += file.getvalue()
        return events

    def betas(self) -> list[float]:
        """Of the rounds, in order."""
        losses = [loss for _, loss in sorted(self.losses.items())]
        return [loss.beta for loss in losses if isinstance(loss, SigmoidLossBlock | GrpoLossBlock)]


def directory_of(config: OnlineDpoConfig) -> RunDirectory:
    return continue_or_create(config)


def told(config: OnlineDpoConfig) -> list[tuple[int | None, list[str]]]:
    """The guard's events in the journal."""
    events = read_events(directory_of(config).path / JOURNAL_NAME)
    return [(event.round, event.payload["decisions"]) for event in events if event.name == "guard"]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    return lambda rank=Telling: Played(tmp_path, rank)


def test_gold_scores_are_measured_and_never_trained_on(play: Callable[..., Played]) -> None:
    """Version v says "good" v times: it scores v, and 1 - |v - 1| by the gold scorer."""
    played = play()
    config = played.config()
    played.process(config)
    directory = directory_of(config)
    found = [sampled(own) for own in (directory.baseline(), *(report.evaluation for report in directory.reports()))]
    assert [(own.score, own.gold) for own in found] == [(0, 0), (1, 1), (2, 0), (3, -1), (4, -2)]
    assert [(own.gold_low, own.gold_high, own.gold_unscored) for own in found[:2]] == [(0, 0, 0), (1, 1, 0)]
    _, held_out = read_candidates(directory.round(2) / "samples.parquet")
    assert [score.parts for score in held_out] == [{"evaluation.gold": 0.0}] * 2
    for index in range(1, 5):
        _, scores = read_candidates(directory.round(index) / "candidates.parquet")
        assert not any(score.parts for score in scores)
    assert "round 2: held-out score 2.000, gold 0.000" in played.output
    assert "round 2: over-optimisation: since round 1 the score rose from 1.000 to 2.000 while" in played.output
    assert "note: over-optimisation: since round 1 the score rose from 1.000 to 4.000" in played.output
    assert "round 1: over-optimisation" not in played.output


def test_a_warning_changes_nothing_but_is_on_record(play: Callable[..., Played]) -> None:
    played = play()
    config = played.config(guard=[{**ON_GOLD_DROP, "action": "warn"}])
    played.process(config)
    assert played.betas() == [0.1] * 4
    line = "gold_drop is 1, above 0.5: warning"
    assert [(index, lines) for index, lines in told(config) if index == 2] == [(2, [line])]
    assert [index for index, _ in told(config)] == [2, 3, 4]
    assert f"round 2: guard: {line}" in played.output and "round 1: guard" not in played.output
    assert f"guard after round 2: {line}" in played.output
    assert directory_of(config).decisions(1) == ()


def test_beta_is_raised_from_the_next_round_on(play: Callable[..., Played]) -> None:
    """gold_drop is 0, 1, 2 and 3 after rounds 1 to 4."""
    played = play()
    config = played.config(guard=[{**ON_GOLD_DROP, "action": "raise_beta", "factor": 3.0}])
    played.process(config)
    assert played.betas() == pytest.approx([0.1, 0.1, 0.3, 0.9])
    assert [report.health["beta"] for report in directory_of(config).reports()] == pytest.approx([0.1, 0.1, 0.3, 0.9])


def test_the_kl_term_is_raised(play: Callable[..., Played]) -> None:
    played = play()
    raising = [{**ON_GOLD_DROP, "action": "raise_kl"}]
    config = played.config(guard=raising, **GROUPS)
    played.process(config)
    assert played.betas() == pytest.approx([0.1, 0.1, 0.2, 0.4])


def test_the_weight_of_the_kl_term_of_a_mix_is_raised(play: Callable[..., Played]) -> None:
    played = play(KlOf)
    played.process(played.config(guard=[{**ON_GOLD_DROP, "action": "raise_kl"}], **KL_MIX))
    found = [loss.loss_weights for _, loss in sorted(played.losses.items()) if isinstance(loss, MixLossBlock)]
    assert found == [pytest.approx((1, weight)) for weight in (0.2, 0.2, 0.4, 0.8)]


def test_a_stop_ends_the_run_as_finished(play: Callable[..., Played], capsys: pytest.CaptureFixture[str]) -> None:
    played = play()
    config = played.config(guard=[{**ON_GOLD_DROP, "action": "stop"}])
    played.process(config)
    directory = directory_of(config)
    assert directory.rounds_finished() == 2
    assert "ended after round 2: guard: gold_drop is 1, above 0.5" in played.output
    done = finished_before(config)
    assert done is not None and done.path == directory.path
    assert "the run has ended early, guard: gold_drop is 1, above 0.5" in capsys.readouterr().out
    assert not [event for event in played.process(config) if event.startswith(("sample", "train"))]


def test_a_run_goes_on_past_a_stop_whose_rule_is_gone(play: Callable[..., Played]) -> None:
    played = play()
    played.process(played.config(guard=[{**ON_GOLD_DROP, "action": "stop"}]))
    config = played.config(guard=[{"measure": "gold_drop", "above": 2.5, "action": "stop"}])
    (directory := directory_of(played.config(guard=[{**ON_GOLD_DROP, "action": "stop"}]))).write_config(config)
    assert finished_before(config) is None
    played.process(config)
    assert directory.rounds_finished() == 4


def test_displacement_is_measured_and_watched(play: Callable[..., Played]) -> None:
    """3 nats in round 1, 6 in round 2, 9 in round 3."""
    played = play(Displacing)
    config = played.config(guard=[{"measure": "displacement", "above": 5.0, "action": "raise_beta"}])
    played.process(config)
    found = [report.health["logps/displacement"] for report in directory_of(config).reports()]
    assert found == pytest.approx([3.0, 6.0, 9.0, 12.0]), "nats, whatever beta is"
    assert played.betas() == pytest.approx([0.1, 0.1, 0.2, 0.4])
    assert "answers both fell below the reference's, by 12.0 and 20.0 nats in round 4" in played.output


GUARDED = [{**ON_GOLD_DROP, "action": "raise_beta"}, {"measure": "score", "above": 2.5, "action": "stop"}]
BEST = {**SETTINGS["evaluation"], "metric_for_best_model": "gold"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Played, OnlineDpoConfig, int]:
    played = Played(tmp_path_factory.mktemp("whole"))
    config = played.config(guard=GUARDED, evaluation=BEST)
    return played, config, len(played.process(config))


@pytest.mark.parametrize("last", range(0, 70, 3))
def test_a_run_that_was_killed_decides_the_same(
    last: int, whole: tuple[Played, OnlineDpoConfig, int], tmp_path: Path
) -> None:
    expected, of_whole, events = whole
    assert expected.betas() == pytest.approx([0.1, 0.1, 0.2]) and events > 40
    if last > events:
        pytest.skip("the run is over by then")
    played = Played(tmp_path)
    config = played.config(guard=GUARDED, evaluation=BEST)
    played.process(config, last)
    played.process(config)
    assert played.betas() == expected.betas()
    one, other = directory_of(config), directory_of(of_whole)
    assert [one.decisions(index) for index in (1, 2, 3, 4)] == [other.decisions(index) for index in (1, 2, 3, 4)]
    assert [report.health for report in one.reports()] == [report.health for report in other.reports()]
    assert told(config) == told(of_whole)
    assert [path.name for path in one.checkpoints()] == [path.name for path in other.checkpoints()] == ["0001", "0003"]


def test_a_report_without_a_decision_gets_it_at_the_next_start(play: Callable[..., Played]) -> None:
    """The driver was killed between the two files."""
    played = play()
    config = played.config(guard=[{**ON_GOLD_DROP, "action": "stop"}])
    played.process(config)
    (directory_of(config).round(2) / "guard.json").unlink()
    assert finished_before(config) is None
    played.process(config)
    assert directory_of(config).rounds_finished() == 2 and len(told(config)) == 1


def test_decisions_that_cannot_be_read_are_no_decisions_not_made(play: Callable[..., Played]) -> None:
    played = play()
    config = played.config(guard=[{**ON_GOLD_DROP, "action": "raise_beta"}])
    played.process(config, 45)
    (directory_of(config).round(1) / "guard.json").write_text("[{]")
    with pytest.raises(RecordError, match="guard.json cannot be read"):
        played.process(config)


def test_the_run_ends_when_patience_does(play: Callable[..., Played]) -> None:
    """gold is 0, 1, 0, -1: best after round 1, and twice in a row not better."""
    played = play()
    config = played.config(evaluation={**BEST, "early_stopping_patience": 2})
    played.process(config)
    directory = directory_of(config)
    assert directory.rounds_finished() == 3 and finished_before(config) is not None
    assert "ended after round 3: early stopping: gold was best after round 1 (1), 2 round(s) ago" in played.output
    assert "best by gold: version 1 (1)" in played.output


def test_the_best_version_is_kept_and_exported(play: Callable[..., Played]) -> None:
    played = play()
    config = played.config(evaluation=BEST)
    played.process(config)
    directory = directory_of(config)
    assert [path.name for path in directory.checkpoints()] == ["0001", "0004"]
    assert best_of(directory, config) == 1


def test_a_best_version_that_there_is_not_cannot_be_exported(play: Callable[..., Played]) -> None:
    played = play()
    config = played.config(evaluation={**BEST, "metric_for_best_model": "kl", "greater_is_better": False})
    played.process(config)
    directory = directory_of(config)
    with pytest.raises(ConfigError, match=r"no trained version is best by kl: the model before training is best \(0\)"):
        best_of(directory, config)
    with pytest.raises(ConfigError, match="metric_for_best_model is null"):
        best_of(directory, played.config())


KNOWING = {**BEST, "capability": {}}
STOPPED = [{**ON_GOLD_DROP, "action": "stop"}]


def asked_of(events: Sequence[str]) -> list[int]:
    """Versions whose capability was measured."""
    found = [event for event in events if event.startswith("policy log-probs")]
    return sorted({int(event.rpartition(" ")[2]) for event in found})


@pytest.mark.parametrize(
    ("guard", "patience", "last"), [(STOPPED, None, 2), ([], 1, 2), ([], 2, 3), ([], None, 4)], ids=str
)
def test_capability_is_that_of_the_last_version_wherever_the_run_ends(
    guard: list[dict[str, Any]], patience: int | None, last: int, play: Callable[..., Played]
) -> None:
    played = play()
    config = played.config(guard=guard, evaluation={**KNOWING, "early_stopping_patience": patience})
    assert asked_of(played.process(config)) == [0, last]
    reports = directory_of(config).reports()
    assert [bool(report.evaluation.capability) for report in reports] == [index == last for index in range(1, last + 1)]
    assert "perplexity_change" in reports[-1].evaluation.capability and "capability" in reports[-1].seconds
    assert f"alignment tax of version {last}: multiple choice" in played.output
    assert "of version 1, the best, it was not measured" in played.output


def test_capability_of_a_run_that_ends_early_survives_any_kill(tmp_path: Path) -> None:
    reference = Played(tmp_path / "whole")
    config = reference.config(guard=STOPPED, evaluation=KNOWING)
    events = len(reference.process(config))
    expected = [report.evaluation for report in directory_of(config).reports()]
    for last in range(events - 6, events):
        played = Played(tmp_path / str(last))
        config = played.config(guard=STOPPED, evaluation=KNOWING)
        first, second = played.process(config, last), played.process(config)
        assert [report.evaluation for report in directory_of(config).reports()] == expected
        measured = [event for event in [*first, *second] if event.startswith("policy log-probs")]
        assert asked_of(measured) == [0, 2]


def test_without_rules_nothing_is_written(play: Callable[..., Played]) -> None:
    played = play()
    config = played.config(evaluation={})
    played.process(config)
    assert not list(directory_of(config).path.rglob("guard.json")) and told(config) == []
    assert [path.name for path in directory_of(config).checkpoints()] == ["0004"]
    assert "gold" not in played.output
