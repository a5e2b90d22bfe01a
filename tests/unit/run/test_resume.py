"""A run that ends at any moment goes on where it was: nothing is sampled, scored or trained twice."""

import io
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import ShmTransport
from raylign.config import OnlineDpoConfig, parse_config
from raylign.errors import ConfigError, DiskError, TrainerError
from raylign.evaluation.capability.likelihood import EncodedTask
from raylign.evaluation.capability.tasks import Passage, Question, Task
from raylign.prompts import InvalidRows, PromptSet
from raylign.prompts.tables import Fault
from raylign.records import Completions, Prompt
from raylign.run.checkpoints import Metrics
from raylign.run.directory import RunDirectory, continue_or_create, differences, require_continuable
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.online_dpo import train
from recipes.opening import take_up
from recipes.run import Run
from tests.fakes import (
    WEIGHT,
    CountingRank,
    Deadly,
    FakeEngine,
    FakeGenerators,
    FakeRank,
    FakeScorer,
    FakeTeam,
    Killed,
    NoFeed,
    fake_trainers,
    token_logp,
)
from tests.faults import record

SETTINGS: dict[str, Any] = {
    "sampling": {"num_generations": 3, "max_resamples": 1},
    "trainer": {"per_device_train_batch_size": 1, "num_train_epochs": 2},
    "schedule": {"rounds": 2, "prompts_per_round": 2},
    "evaluation": {"capability": {"tasks": ["multiple_choice", "perplexity"]}},
    "run": {"seed": 7},
}


def prompts(*names: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(name, ({"role": "user", "content": name},), (1, 2, 3)) for name in names)


TASKS = (
    EncodedTask(
        Task("multiple_choice", (Question("q", "a", ("b", "c d"), 0), Question("r", "a", ("b c", "d"), 0))),
        tuple((Completions((1,), own),) for own in (((2,), (3, 4)), ((2, 3), (4,)))),
    ),
    EncodedTask(Task("perplexity", (Passage("t", "abcd"),)), ((Completions((1,), ((2, 3),)),),)),
)
PROMPTS = PromptSet(prompts("a", "b", "c"), prompts("x", "y"), "here", "00")


def config_in(folder: Path, **options: Any) -> OnlineDpoConfig:
    return parse_config({**SETTINGS, **options}, [f"run.dir={folder}/runs"])


def run_once(config: OnlineDpoConfig, folder: Path, last: int = 10_000, rank: type[FakeRank] = CountingRank) -> Deadly:
    """One process with fresh roles on the run directory of `config`; it lives for `last` events."""
    events = Deadly(last)
    directory = continue_or_create(config)
    with Journal(directory.path / JOURNAL_NAME) as journal:
        run = Run(config, directory, Tracker(journal, NoFeed()), Console(file=io.StringIO()), TASKS)
        run.open_record(PROMPTS, "train")
        group, engine = fake_trainers(rank(events, config), config), FakeEngine(events)
        generators = FakeGenerators([engine])
        publisher = WeightPublisher(
            group, generators, ShmTransport(OneNode(folder), {WEIGHT: (1,)}, 1), Canary(((1, 2, 3),), 0.25), 1.0
        )
        team = FakeTeam(generators, group, FakeScorer(events, config.scoring), publisher)
        try:
            take_up(run, team, config.model)
            train(run, PROMPTS, team, config)
        except Killed:
            return events
    return events


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.relative_to(folder).as_posix(): pq.read_table(path).to_pylist()
        for path in folder.glob("rounds/*/*.parquet")
    }


def what_it_came_to(directory: RunDirectory) -> list[dict[str, Any]]:
    """Without what a clock said."""
    timeless = {"seconds": 0.0, "gb_per_s": 0.0}
    return [
        {**asdict(report), "seconds": sorted(report.seconds), "sync": {**report.sync, **timeless}}
        for report in directory.reports()
    ]


def happened(directory: RunDirectory, name: str) -> list[Any]:
    return [event.payload for event in read_events(directory.path / JOURNAL_NAME) if event.name == name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deadly, RunDirectory]:
    folder = tmp_path_factory.mktemp("whole")
    config = config_in(folder)
    return run_once(config, folder), continue_or_create(config)


def test_the_run_has_enough_moments_to_end_in(whole: tuple[Deadly, RunDirectory]) -> None:
    assert len(whole[0]) > 30 and len(what_it_came_to(whole[1])) == 2


@pytest.mark.parametrize("last", range(40))
def test_it_ends_as_if_it_had_not_been_killed(last: int, whole: tuple[Deadly, RunDirectory], tmp_path: Path) -> None:
    events, expected = whole
    if last > len(events):
        pytest.skip("the run is over by then")
    config = config_in(tmp_path)
    first = run_once(config, tmp_path, last)
    second = run_once(config, tmp_path)
    directory = continue_or_create(config)
    assert what_it_came_to(directory) == what_it_came_to(expected)
    assert tables(directory.path) == tables(expected.path)
    assert [p.name for p in directory.checkpoints()] == [p.name for p in expected.checkpoints()]
    for kind in ("round_finished", "evaluation", "prompts"):
        assert len(happened(directory, kind)) == len(happened(expected, kind)), kind
    # What was finished is not done again: prompts of rounds, batches of scores, whole trainings.
    once = [event for event in events if event in ("score 6", "sample a", "sample b", "sample c")]
    done = [event for event in [*first, *second] if event in ("score 6", "sample a", "sample b", "sample c")]
    assert sorted(done) == sorted(once)


def test_capability_is_measured_first_and_last(whole: tuple[Deadly, RunDirectory]) -> None:
    """A fake policy of version v gives every token the same log-prob, so that the shorter answer is the likelier."""
    events, directory = whole
    asked = [event for event in events if event.startswith("policy log-probs")]
    assert asked == [f"policy log-probs {rows} of version {version}" for version in (0, 2) for rows in (2, 1)]
    first, last = directory.baseline().capability, directory.reports()[-1].evaluation.capability
    assert directory.reports()[0].evaluation.capability == {}
    assert (first["multiple_choice"], first["perplexity"]) == pytest.approx((0.5, math.exp(-token_logp(0))))
    assert last["perplexity"] == pytest.approx(math.exp(-token_logp(2)))
    assert last["perplexity_change"] == pytest.approx(last["perplexity"] - first["perplexity"])
    assert "perplexity_change" not in first and last["multiple_choice_change"] == 0
    (evaluated,), finished = happened(directory, "evaluation"), happened(directory, "round_finished")
    assert evaluated["capability"] == first and "capability" not in evaluated["evaluation"]
    assert [event["capability"] for event in finished] == [{}, last]
    assert sorted(json.loads((directory.round(2) / "capability.json").read_text())) == ["multiple_choice", "perplexity"]


def test_damaged_capability_of_the_last_round_is_measured_again(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    events = run_once(config, tmp_path)
    directory = continue_or_create(config)
    (directory.round(2) / "report.json").unlink()
    (directory.round(2) / "capability.json").write_text("{}")
    expected = directory.reports()[:1]
    again = run_once(config, tmp_path)
    assert [event for event in again if event.startswith("policy log-probs")] == [
        event for event in events if event.endswith("of version 2") and event.startswith("policy log-probs")
    ]
    assert directory.reports()[:1] == expected and directory.reports()[1].evaluation.capability


def test_a_run_that_is_to_measure_it_from_now_on_tells_no_change(tmp_path: Path) -> None:
    config = config_in(tmp_path, evaluation={}, schedule={"rounds": 1, "prompts_per_round": 2})
    run_once(config, tmp_path)
    later = config_in(tmp_path)
    directory = continue_or_create(config)
    directory.write_config(later)
    run_once(later, tmp_path)
    assert directory.baseline().capability == {}
    last = directory.reports()[-1].evaluation.capability
    assert "perplexity" in last and "perplexity_change" not in last


GROUPS: dict[str, Any] = {"pairing": {"type": "group"}, "loss": {"loss_type": "grpo", "beta": 0.1}}


@pytest.fixture(scope="module")
def whole_of_groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deadly, RunDirectory]:
    folder = tmp_path_factory.mktemp("groups")
    config = config_in(folder, **GROUPS)
    return run_once(config, folder), continue_or_create(config)


def test_groups_are_kept_with_the_log_probs_of_the_policy_that_the_round_found(
    whole_of_groups: tuple[Deadly, RunDirectory],
) -> None:
    """Version 1 gives each token -1/2, the initial policy -1; both passes come before the first step."""
    events, directory = whole_of_groups
    rows = tables(directory.path)["rounds/0002/preferences.parquet"]
    assert rows
    for row in rows:
        lengths = [len(ids) for ids in row["token_ids"]]
        assert row["old_logprobs"] == [[-0.5] * length for length in lengths]
        assert row["reference_logprobs"] == [[-1.0] * length for length in lengths]
    first = events.index(next(event for event in events if event.startswith("train")))
    assert [event.split()[0] for event in events[first - 2 : first]] == ["reference", "old"]


@pytest.mark.parametrize("last", range(0, 45, 3))
def test_a_run_on_groups_ends_as_if_it_had_not_been_killed(
    last: int, whole_of_groups: tuple[Deadly, RunDirectory], tmp_path: Path
) -> None:
    events, expected = whole_of_groups
    if last > len(events):
        pytest.skip("the run is over by then")
    config = config_in(tmp_path, **GROUPS)
    run_once(config, tmp_path, last)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    assert what_it_came_to(directory) == what_it_came_to(expected)
    assert tables(directory.path) == tables(expected.path)


def test_rows_that_are_left_out_are_said_and_listed_in_the_run_directory(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    directory = continue_or_create(config)
    left_out = InvalidRows("here", "line", (Fault(3, "no 'prompt'", {"\x1b": 1}, "fill it"),), 5)
    for _ in range(2):
        console = Console(file=(out := io.StringIO()), width=400)
        with Journal(directory.path / JOURNAL_NAME) as journal:
            run = Run(config, directory, Tracker(journal, NoFeed()), console)
            run.open_record(replace(PROMPTS, invalid=(left_out,)), "train")
        file = directory.path / "quarantine.jsonl"
        assert out.getvalue() == f"here: 1 of 5 rows left out (line 3): see {file}\n"
        assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == [3]


def test_a_finished_run_has_nothing_to_do(whole: tuple[Deadly, RunDirectory]) -> None:
    _, directory = whole
    with Journal(directory.path / JOURNAL_NAME) as journal:
        run = Run(directory.config(), directory, Tracker(journal, NoFeed()), Console(file=io.StringIO()))
        assert list(run.rounds_to_do()) == []


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_its_round_trained_again(
    damage: str, whole: tuple[Deadly, RunDirectory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    run_once(config, tmp_path)
    directory = continue_or_create(config)
    victim = directory.checkpoint(2) / "model.safetensors"
    content = victim.read_bytes()
    match damage:
        case "cut":
            victim.write_bytes(content[:-3])
        case "flipped":
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "missing":
            victim.unlink()
    again = run_once(config, tmp_path)
    assert "0002 is damaged (model.safetensors" in caplog.text and "the one before it is taken" in caplog.text
    assert what_it_came_to(directory) == what_it_came_to(whole[1])
    assert (directory.path / "checkpoints/damaged-0002").is_dir() and directory.checkpoint(2).is_dir()
    assert not any(event in ("score 6", "sample a", "sample b", "sample c") for event in again)
    assert again.count("step") == 4 and len(happened(directory, "round_finished")) == 2
    record(
        f"checkpoint damaged: a file is {damage}",
        "its file changed between two starts",
        lost="nothing: said, kept aside, the one before taken, its round trained again from its files",
    )


@pytest.mark.fault
def test_damaged_samples_of_an_unfinished_round_are_sampled_again(
    whole: tuple[Deadly, RunDirectory], tmp_path: Path
) -> None:
    config = config_in(tmp_path)
    events = whole[0]
    second_training = [index for index, event in enumerate(events) if event.startswith("train ")][1]
    run_once(config, tmp_path, second_training)
    directory = continue_or_create(config)
    table = directory.round(2) / "candidates.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    again = run_once(config, tmp_path)
    assert "score 6" in again and not any(event.startswith("sample a") for event in again)
    assert what_it_came_to(directory) == what_it_came_to(whole[1])
    record("a stage's file damaged", "its last byte cut off", lost="that stage, which is done again")


class Interrupted(CountingRank):
    """Ctrl-C comes in the middle of the third step."""

    def train_step(self) -> Metrics:
        report = super().train_step()
        if len(self._reports) == 3:
            raise KeyboardInterrupt
        return report


def test_an_interrupted_round_goes_on_in_its_middle(whole: tuple[Deadly, RunDirectory], tmp_path: Path) -> None:
    """The step that was running when the signal came is finished, saved and not taken again."""
    config = config_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_once(config, tmp_path, rank=Interrupted)
    directory = continue_or_create(config)
    partial = directory.path / "checkpoints/0001-partial"
    assert len(json.loads((partial / "progress.json").read_text())["steps"]) == 3
    again = run_once(config, tmp_path)
    assert "train 2 seed 8 from step 3" in again and again.count("step") == 1 + 4
    assert what_it_came_to(directory) == what_it_came_to(whole[1]) and not partial.exists()


class NotFinite(CountingRank):
    """Every loss is NaN."""

    def train_step(self) -> Metrics:
        super().train_step()
        self._reports[-1] = {"loss": float("nan"), "skipped_steps": 1.0, "non_finite_steps": 1.0}
        return self._reports[-1]


@pytest.mark.fault
def test_steps_that_are_not_finite_stop_the_run_with_their_batches_saved(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(TrainerError, match=r"the last 3 steps .*max_skipped_steps=3.*raylign resume RUN"):
        run_once(config, tmp_path, rank=NotFinite)
    directory = continue_or_create(config)
    saved = sorted(path.name for path in directory.round(1).glob("bad-step-*.parquet"))
    assert saved == [f"bad-step-{number:04d}.parquet" for number in (1, 2, 3)]
    assert pq.read_table(directory.round(1) / saved[0]).num_rows == 1 and directory.checkpoints() == []
    assert [event["non_finite"] for event in happened(directory, "step")] == [["metrics.loss"]] * 3
    record(
        "losses that are not finite, three in a row",
        "NaN from the trainer",
        lost="nothing: steps skipped, batches saved, stops at the last good checkpoint with advice",
    )


def test_other_settings_are_named_and_refused(tmp_path: Path) -> None:
    run_once(config_in(tmp_path), tmp_path, last=3)
    other = config_in(tmp_path, sampling={"num_generations": 5, "max_resamples": 1})
    assert differences(config_in(tmp_path), other) == ["sampling.num_generations: 3 -> 5"]
    with pytest.raises(ConfigError, match=r"other settings:\n  sampling.num_generations: 3 -> 5\n.*raylign resume"):
        require_continuable(other)


@pytest.mark.fault
def test_one_process_at_a_time(tmp_path: Path) -> None:
    directory = continue_or_create(config_in(tmp_path))
    with (
        directory.locked(),
        pytest.raises(ConfigError, match="is being worked on by another process"),
        directory.locked(),
    ):
        raise AssertionError("two at once")
    record("two processes on one run", "a second start", lost="nothing: the second is refused")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes inside, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault
@pytest.mark.parametrize("size", [0, 600, 1_200, 2_500, 4_000, 6_000])
def test_a_full_disk_stops_the_run_and_corrupts_nothing(
    size: int, whole: tuple[Deadly, RunDirectory], tmp_path: Path
) -> None:
    config = config_in(tmp_path)
    directory = continue_or_create(config)
    with files_up_to(size), pytest.raises(DiskError, match=r"cannot be written: File too large; free some space"):
        run_once(config, tmp_path)
    run_once(config, tmp_path)
    assert what_it_came_to(directory) == what_it_came_to(whole[1])
    assert tables(directory.path) == tables(whole[1].path)
    record(
        "disk full in the driver",
        f"no file of the process may grow beyond {size:,} bytes",
        lost="nothing: stops and says so; the same command goes on",
    )
