"""The online DPO recipe over the roles of tests.fakes: its order, its files and its numbers."""

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import ShmTransport
from raylign.config import OnlineDpoConfig, load_config, load_recipe, parse_config
from raylign.config.reference import NoReferenceBlock
from raylign.errors import NoPreferencesError, ScorerError, TrainerError, WeightSyncError
from raylign.evaluation.intervals import share_interval
from raylign.pairing.usable import Dropped
from raylign.prompts import PromptSet
from raylign.records import Evaluation, Prompt, RoundReport
from raylign.report.tables import STAGES, Sample, sampled
from raylign.roles import NodePath
from raylign.run.checkpoints import Metrics
from raylign.run.directory import continue_or_create
from raylign.run.rounds import RoundLog
from raylign.sampling.decoding import prompt_seed
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.online_dpo import evaluate_policy, run_round, train
from recipes.run import Run
from tests.fakes import (
    WEIGHT,
    FakeEngine,
    FakeGenerators,
    FakeRank,
    FakeScorer,
    FakeTeam,
    NoFeed,
    count_good,
    fake_trainers,
)

RECIPES = sorted(
    path
    for path in (Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml")
    if isinstance(load_recipe(path), OnlineDpoConfig)
)


def prompts(*names: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(name, ({"role": "user", "content": name},), (1, 2, 3)) for name in names)


TRAIN = prompts("a", "tie", "b", "mute")
HELD_OUT = prompts("x", "y")


def moody(prompt: Prompt, completion: str) -> float | None:
    """The number of "good", but 0 for the prompt `tie` and nothing for `mute`."""
    return {"tie": 0.0, "mute": None}.get(prompt.id, count_good(prompt, completion))


@dataclass
class Desk:
    """A run directory with its journal, and a team of fakes."""

    config: OnlineDpoConfig
    run: Run
    team: FakeTeam
    rank: FakeRank
    engine: FakeEngine
    events: list[str]
    output: io.StringIO

    @property
    def folder(self) -> Path:
        return self.run.directory.path

    def round(self, index: int) -> tuple[RoundReport, list[Sample]]:
        return run_round(self.log(index), TRAIN, HELD_OUT, self.team, self.config)

    def log(self, index: int) -> RoundLog:
        return self.run.round_log(index)

    def rows(self, index: int, name: str) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = pq.read_table(self.folder / f"rounds/{index:04d}/{name}.parquet").to_pylist()
        return rows


Open = Callable[..., Desk]
CONFIG = {
    "sampling": {"num_generations": 3},
    "scoring": {"max_unscored": 0.5},
    "trainer": {"per_device_train_batch_size": 1},
    "run": {"seed": 7},
}


@pytest.fixture
def open_desk(tmp_path: Path) -> Iterator[Open]:
    journals: list[Journal] = []

    def make(
        config: OnlineDpoConfig | None = None,
        value: Callable[[Prompt, str], float | None] = moody,
        rank: type[FakeRank] = FakeRank,
        engine: type[FakeEngine] = FakeEngine,
    ) -> Desk:
        config = config or parse_config(CONFIG, [f"run.dir={tmp_path}/runs"])
        directory = continue_or_create(config)
        journals.append(Journal(directory.path / JOURNAL_NAME))
        tracker = Tracker(journals[-1], NoFeed())
        events: list[str] = []
        output = io.StringIO()
        run = Run(config, directory, tracker, Console(file=output, width=200))
        one_rank, one = rank(events, config), engine(events)
        group = fake_trainers(one_rank, config)
        generators = FakeGenerators([one])
        transport = ShmTransport(OneNode(tmp_path), {WEIGHT: (1,)}, 1)
        publisher = WeightPublisher(group, generators, transport, Canary(((1, 2, 3),), 0.25), 1.0)
        team = FakeTeam(generators, group, FakeScorer(events, config.scoring, value), publisher)
        return Desk(config, run, team, one_rank, one, events, output)

    yield make
    for journal in journals:
        journal.close()


def test_a_round_in_order(open_desk: Open) -> None:
    desk = open_desk()
    desk.round(1)
    assert desk.events == [
        *[f"sample {prompt.id}" for prompt in TRAIN],
        "score 12",
        "reference 2 seed 8 after 0 rounds",
        *["train 2 seed 8", "save weights"],
        *["save weights", "load weights"],
        *["sample x", "sample y"],
        "score 2",
    ]


def test_the_report_of_round_1_by_hand(open_desk: Open) -> None:
    """Version 0 answers with 1, 2 and 3 tokens; version 1 with 2 tokens at -0.5 nats, which are -1 under version 0."""
    report, samples = open_desk().round(1)
    assert (report.index, report.policy_version) == (1, 1)
    dropped = dict.fromkeys(get_args(Dropped), 0) | {"unscored_groups": 1, "ties": 1}
    counted = {"prompts": 4, "candidates": 12, "unscored": 3, "truncated": 0, "preferences": 2}
    assert dict(report.counts) == counted | dropped
    # The policy still is the reference: every loss is ln 2.
    assert [step["loss"] for step in report.steps] == pytest.approx([math.log(2)] * 2)
    gaps = {name: value for name, value in report.sync.items() if name.startswith("logprob_gap")}
    assert gaps == {"logprob_gap_mean": 0.0, "logprob_gap_max": 0.0}
    assert report.sync["bytes"] > 0 and report.sync["gb_per_s"] > 0
    assert report.evaluation == Evaluation(
        score=1.0,
        score_low=1.0,
        score_high=1.0,
        kl=1.0,  # 2 tokens, (-0.5 - -1) each
        length=2.0,
        distinct_2=0.5,  # both completions are "good end"
        eos_rate=1.0,
        completions=2,
        unscored=0,
        kl_initial=1.0,
        kl_initial_per_token=0.5,
        kl_initial_k3=math.expm1(-1.0) + 1.0,
        kl_initial_k3_per_token=math.expm1(-0.5) + 0.5,
        entropy=0.5,
        distinct_1=0.5,
        distinct_3=0.0,
        seq_rep_4=0.0,
        truncated_rate=0.0,
    )
    assert report.health == {"beta": 0.1}
    assert tuple(report.seconds) == STAGES and all(seconds >= 0 for seconds in report.seconds.values())
    assert [(sample.prompt.id, sample.completion) for sample in samples] == [("x", "good end"), ("y", "good end")]


def test_versions_are_compared_with_the_first_and_the_one_before(open_desk: Open, tmp_path: Path) -> None:
    """Version v scores v on both held-out prompts, so that each wins over every earlier one."""
    small = [f"run.dir={tmp_path}/runs", "schedule.rounds=3", "schedule.prompts_per_round=2"]
    desk = open_desk(parse_config(CONFIG, small), value=count_good)
    train(desk.run, PromptSet(prompts("a", "b"), HELD_OUT, "s", "0"), desk.team, desk.config)
    baseline = sampled(desk.run.directory.baseline())
    assert baseline.win_rate is None and baseline.win_rate_previous is None
    low, high = map(float, share_interval(np.ones(2), 0.95))
    for report in desk.run.directory.reports():
        found = sampled(report.evaluation)
        assert (found.win_rate, found.win_rate_low, found.win_rate_high) == (1.0, low, high)
        assert (found.win_rate_previous, found.win_rate_previous_low) == (1.0, low)
        assert found.win_rate_length_controlled == pytest.approx(3 / 4, abs=0.01)  # two wins, and one and a loss
    events = [event for event in read_events(desk.folder / JOURNAL_NAME) if event.name == "round_finished"]
    assert [event.payload["evaluation"]["win_rate_low"] for event in events] == [low] * len(events)


def test_win_rates_are_left_out_where_nobody_asks(open_desk: Open, tmp_path: Path) -> None:
    config = parse_config(CONFIG, [f"run.dir={tmp_path}/runs", "evaluation.win_rate=[previous_round]"])
    desk = open_desk(config)
    evaluate_policy(desk.log(0), HELD_OUT, desk.team, config)
    report, _ = desk.round(1)
    assert sampled(report.evaluation).win_rate is None and sampled(report.evaluation).win_rate_previous == 1.0


def test_round_2_trains_on_what_version_1_sampled(open_desk: Open) -> None:
    desk = open_desk()
    desk.round(1)
    report, _ = desk.round(2)
    # Version 1 answers with 2, 3 and 4 tokens and is 0.5 nats a token above the reference:
    # delta = 0.1 * (4 * 0.5 - 2 * 0.5) = 0.1, loss = ln(1 + e^-0.1)
    assert [step["loss"] for step in report.steps] == pytest.approx([0.6443967] * 2)
    assert {row["policy_version"] for row in desk.rows(2, "candidates")} == {1}
    assert {row["policy_version"] for row in desk.rows(2, "samples")} == {2} and desk.engine.weights == 2
    assert sampled(report.evaluation).kl == pytest.approx(3 * (1 - 1 / 3))
    stages = [event for event in desk.events if event.startswith(("reference", "train"))]
    assert stages == [
        *["reference 2 seed 8 after 0 rounds", "train 2 seed 8"],
        *["reference 2 seed 9 after 1 rounds", "train 2 seed 9"],
    ]


def test_without_a_reference_nothing_is_measured_against_one(open_desk: Open, tmp_path: Path) -> None:
    """SimPO, beta = 1: version 0 gives every token -1 nats, so that its margin is -simpo_gamma."""
    loss = "loss={loss_type: simpo, beta: 1, simpo_gamma: 0.5}"
    desk = open_desk(parse_config(CONFIG, [f"run.dir={tmp_path}/runs", loss, "reference.policy=none"]))
    report, _ = desk.round(1)
    assert sampled(report.evaluation).kl is None
    assert [step["loss"] for step in report.steps] == pytest.approx([math.log1p(math.exp(0.5))] * 2)
    assert [row["reference_logps"] for row in desk.rows(1, "preferences")] == [[0.0, 0.0]] * 2
    desk.run.finish_round(report, [])
    assert "held-out score 1.000, 2 preferences" in desk.output.getvalue()


def test_ktos_preferences_carry_samples_of_the_policy(open_desk: Open, tmp_path: Path) -> None:
    """To prompts of the round, whether they gave a pair; read back, they are the same."""
    desk = open_desk(parse_config(CONFIG, [f"run.dir={tmp_path}/runs", "loss.loss_type=kto"]))
    desk.round(1)
    rows = desk.rows(1, "preferences")
    assert [row["prompt_id"] for row in rows] == ["a", "b"]
    candidates = [row["token_ids"] for row in desk.rows(1, "candidates")]
    assert all(row["kl_prompt_token_ids"] == [1, 2, 3] and row["kl_token_ids"] in candidates for row in rows)
    lengths = [len(row["kl_token_ids"]) for row in rows]  # type: ignore[arg-type]
    assert [row["kl_reference_logp"] for row in rows] == [-float(length) for length in lengths]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["reference.policy=initial"], [1.0, 2.0]),
        (["reference.policy=previous_round"], [1.0, None]),
        (["reference.policy=previous_round", "model.lora.r=4"], [1.0, 2.0]),
        (["reference.policy=ema"], [1.0, None]),
        (["reference.policy=sampler"], [None, None]),
        (["reference.policy=sampler", "model.lora.r=4"], [1.0, 2.0]),
        (["reference={policy: none}", "loss={loss_type: simpo}", "model.lora.r=4"], [1.0, 2.0]),
    ],
)
def test_kl_to_the_initial_policy_is_told_wherever_it_can_be_had(
    options: list[str], expected: list[float | None], open_desk: Open, tmp_path: Path
) -> None:
    """2 tokens of -1/2 nats after round 1 and 3 of -1/3 after round 2, -1 each under version 0.

    Without an adapter and after its first move, nothing else than the initial policy takes its place.
    """
    desk = open_desk(parse_config(CONFIG, [f"run.dir={tmp_path}/runs", *options]))
    found = [sampled(desk.round(index)[0].evaluation).kl_initial for index in (1, 2)]
    assert found == [None if kl is None else pytest.approx(kl) for kl in expected]


def test_the_sampler_is_a_reference_by_the_log_probs_it_sampled_with(open_desk: Open, tmp_path: Path) -> None:
    """The best candidate of round 2 has 4 tokens and the worst 2, of -0.5 nats each; LD-DPO halves the last two."""
    options = [f"run.dir={tmp_path}/runs", "reference.policy=sampler", "loss.ld_alpha=0.5"]
    desk = open_desk(parse_config(CONFIG, options))
    desk.round(1)
    desk.round(2)
    assert [row["reference_logps"] for row in desk.rows(2, "preferences")] == [[-1.5, -1.0]] * 2


def test_the_files_of_a_round(open_desk: Open) -> None:
    desk = open_desk()
    desk.round(1)
    candidates = desk.rows(1, "candidates")
    assert [(row["prompt_id"], row["index"]) for row in candidates] == [(p.id, i) for p in TRAIN for i in range(3)]
    assert [row["score"] for row in candidates] == [0, 1, 2, 0, 0, 0, 0, 1, 2, None, None, None]
    seeds = [prompt_seed(7, 1, prompt.id) + index for prompt in TRAIN for index in range(3)]
    assert [row["seed"] for row in candidates] == seeds
    first, second = desk.rows(1, "preferences")
    assert (first["prompt_id"], second["prompt_id"]) == ("a", "b")
    assert (first["chosen"], first["rejected"], first["indices"]) == ("good good end", "end", [2, 0])
    assert (first["scores"], first["reference_logps"]) == ([2.0, 0.0], [-3.0, -1.0])
    assert [row["text"] for row in desk.rows(1, "samples")] == ["good end", "good end"]


def test_the_report_says_what_scoring_the_candidates_took(open_desk: Open) -> None:
    desk = open_desk()
    report, samples = desk.round(1)
    expected = {"calls": 1, "items": 12, "cache_hits": 0, "failures": 0, "call_mean_s": 2.0, "call_p95_s": 2.0}
    expected |= {"latency_mean_s": 2.0 / 12, "latency_p95_s": 2.0 / 12}
    assert report.scoring == {f"function/{name}": pytest.approx(value) for name, value in expected.items()}
    assert json.loads((desk.folder / "rounds/0001/scoring.json").read_text()) == report.scoring
    desk.run.finish_round(report, samples)
    [finished] = [event for event in read_events(desk.folder / JOURNAL_NAME) if event.name == "round_finished"]
    assert finished.payload["scoring"] == report.scoring


def test_held_out_prompts_get_the_same_seeds_from_every_version(open_desk: Open) -> None:
    desk = open_desk()
    evaluation, _ = evaluate_policy(desk.log(0), HELD_OUT, desk.team, desk.config)
    assert [event.name for event in read_events(desk.folder / JOURNAL_NAME)] == ["artifact"]
    desk.round(1)
    assert sampled(evaluation).score == 0.0 and sampled(evaluation).kl == 0.0
    assert [row["seed"] for row in desk.rows(0, "samples")] == [prompt_seed(7, 0, name) for name in "xy"]
    assert [row["seed"] for row in desk.rows(1, "samples")] == [prompt_seed(7, 0, name) for name in "xy"]
    assert [row["policy_version"] for row in desk.rows(0, "samples")] == [0, 0]


def test_samples_are_the_first_completion_of_each_held_out_prompt(open_desk: Open, tmp_path: Path) -> None:
    config = parse_config(CONFIG, [f"run.dir={tmp_path}/runs", "evaluation.num_generations=3"])
    desk = open_desk(config)
    evaluation, samples = evaluate_policy(desk.log(0), HELD_OUT, desk.team, config)
    assert sampled(evaluation).completions == 6 and sampled(evaluation).score == 1.0
    assert [(s.prompt.id, s.completion, s.score.value) for s in samples] == [("x", "end", 0.0), ("y", "end", 0.0)]


def test_the_journal_has_stages_and_steps_as_they_happened(open_desk: Open) -> None:
    desk = open_desk()
    report, _ = desk.round(1)
    events = list(read_events(desk.folder / JOURNAL_NAME))
    shown = [str(event.payload.get("name", event.payload.get("step", event.payload.get("kind")))) for event in events]
    assert [f"{event.name} {text}" for event, text in zip(events, shown, strict=True)] == [
        "round_started None",
        *[f"stage {name}" for name in STAGES[:3]],
        "artifact preferences",
        "stage reference",
        *["step 1", "step 2"],
        *[f"stage {name}" for name in ("train", "publish")],
        "artifact samples",
        "stage evaluate",
    ]
    assert {event.payload["round"] for event in events} == {1}
    assert [event.payload["metrics"] for event in events if event.name == "step"] == list(report.steps)
    assert "round 1 sample 4/4 prompts in" in desk.output.getvalue()
    assert "round 1 score 12/12 candidates in" in desk.output.getvalue()
    assert "round 1 train 2/2 steps in" in desk.output.getvalue()


class Failing(FakeRank):
    """Dies at the first optimizer step."""

    def train_step(self) -> Metrics:
        raise TrainerError("rank 0 died")


def test_what_was_sampled_and_chosen_is_on_disk_before_training(open_desk: Open) -> None:
    desk = open_desk(rank=Failing)
    with pytest.raises(TrainerError, match="rank 0 died"):
        desk.round(1)
    assert sorted(path.name for path in (desk.folder / "rounds/0001").iterdir()) == [
        "candidates.parquet",
        "preferences.parquet",
        "sampled.jsonl",
        "scoring.json",
        "stages.json",
    ]
    assert "load weights" not in desk.events and desk.engine.label_now == 0


def test_a_round_without_pairs_stops_before_training(open_desk: Open) -> None:
    desk = open_desk(value=lambda prompt, completion: 1.0)
    with pytest.raises(NoPreferencesError, match="round 1 gave no pair from 12 candidates"):
        desk.round(1)
    assert desk.events[-1] == "score 12" and len(desk.rows(1, "candidates")) == 12


def test_too_many_unscored_candidates_stop_the_round(open_desk: Open) -> None:
    desk = open_desk(value=lambda prompt, completion: None if prompt.id != "a" else 1.0)
    with pytest.raises(ScorerError):
        desk.round(1)
    assert desk.events[-1] == "score 12"


class Stale(FakeEngine):
    """Says it took the weights and keeps the old ones."""

    async def take_weights(self, file: NodePath, version: int) -> None:
        await self.label(version)


def test_a_round_whose_weights_did_not_arrive_is_no_round(open_desk: Open) -> None:
    desk = open_desk(engine=Stale)
    with pytest.raises(WeightSyncError, match="by 0.5000 nats a token"):
        desk.round(1)
    assert desk.run.directory.reports() == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_online_recipe_runs_from_baseline_to_summary(path: Path, open_desk: Open, tmp_path: Path) -> None:
    small = ["schedule.rounds=3", "schedule.prompts_per_round=2", f"run.dir={tmp_path}/runs", "pairing.min_margin=0"]
    config = load_config(path, [*small, "trainer.save_total_limit=2"])
    desk = open_desk(config, value=count_good)
    held_out = prompts("x", "y", "z")
    train(desk.run, PromptSet(prompts("a", "b", "c"), held_out, "here", "00"), desk.team, config)
    desk.run.summary()
    reports = desk.run.directory.reports()
    assert [report.policy_version for report in reports] == [1, 2, 3]
    assert [sampled(report.evaluation).score for report in reports] == [1.0, 2.0, 3.0]
    assert [report.counts["preferences"] for report in reports] == [2, 2, 2]
    assert [folder.name for folder in desk.run.directory.checkpoints()] == ["0002", "0003"]
    baseline = json.loads((desk.folder / "rounds/0000/report.json").read_text())["evaluation"]
    kl = None if isinstance(config.reference, NoReferenceBlock) else 0.0
    of_one_word = Evaluation(0.0, 0.0, 0.0, kl, 1.0, 0.0, 1.0, 3, 0, 0.0, 0.0, 0.0, 1.0, 1 / 3, 0.0, 0.0, 0.0)
    assert baseline == asdict(replace(of_one_word, kl_initial_k3_per_token=0.0))
    names = [event.name for event in read_events(desk.folder / JOURNAL_NAME)]
    assert names.index("evaluation") < names.index("round_started") and names.count("round_finished") == 3
    text = desk.output.getvalue()
    assert "round 0: held-out score 0.000" in text and "round 3: held-out score 3.000" in text
    assert f"results: {desk.folder}" in text


def test_prompts_without_a_pair_are_sampled_again(open_desk: Open, tmp_path: Path) -> None:
    """`tie` and `mute` give no pair however often they are asked."""
    desk = open_desk(parse_config(CONFIG, [f"run.dir={tmp_path}/runs", "sampling.max_resamples=2"]))
    report, _ = desk.round(1)
    asked = [event for event in desk.events if event.startswith(("sample", "score"))]
    again = ["sample tie", "sample mute", "score 6"]
    assert asked[:11] == [*[f"sample {prompt.id}" for prompt in TRAIN], "score 12", *again, *again]
    assert report.counts["candidates"] == 12 + 6 + 6 and report.counts["preferences"] == 2
    assert {"sample-1", "score-1", "sample-2", "score-2"} <= report.seconds.keys()
    seeds = [{row["seed"] for row in desk.rows(1, name)} for name in ("candidates", "candidates-1", "candidates-2")]
    assert len(seeds[0] | seeds[1] | seeds[2]) == 12 + 6 + 6


def test_a_pair_may_have_a_candidate_of_a_further_attempt(open_desk: Open, tmp_path: Path) -> None:
    """The scorer has no opinion of the first candidates of `mute`; of the later ones it has."""
    seen = []

    def late(prompt: Prompt, text: str) -> float | None:
        seen.append(prompt.id)
        return None if prompt.id == "mute" and seen.count("mute") <= 3 else float(text.count("good"))

    config = parse_config(CONFIG, [f"run.dir={tmp_path}/runs", "sampling.max_resamples=1"])
    desk = open_desk(config, value=late)
    report, _ = desk.round(1)
    assert report.counts["preferences"] == 4 and report.counts["candidates"] == 12 + 3
    (of_mute,) = [row for row in desk.rows(1, "preferences") if row["prompt_id"] == "mute"]
    assert of_mute["indices"] == [5, 3] and of_mute["scores"] == [2.0, 0.0]


def test_prompts_that_are_always_wrong_are_drawn_no_more(open_desk: Open, tmp_path: Path) -> None:
    """`tie` scores 0 in round 1; `mute` is never scored, which settles nothing."""
    curriculum = "schedule={rounds: 2, prompts_per_round: 4, curriculum: {wrong_to: 0}}"
    desk = open_desk(parse_config(CONFIG, [f"run.dir={tmp_path}/runs", curriculum]))
    train(desk.run, PromptSet(TRAIN, HELD_OUT, "here", "00"), desk.team, desk.config)
    drawn = [{row["prompt_id"] for row in desk.rows(index, "candidates")} for index in (1, 2)]
    assert drawn == [{"a", "tie", "b", "mute"}, {"a", "b", "mute"}]
    assert "left out are 0 prompts that are always right, 1 always wrong" in desk.output.getvalue()
