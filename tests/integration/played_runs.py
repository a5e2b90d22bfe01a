"""A small campaign played through a Tracker, and what MLflow must then have of it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Run, Trace
from mlflow.tracking import MlflowClient

from raylign.config import OnlineDpoConfig, dump_config, parse_config
from raylign.records import Candidate, Evaluation, Preference, Prompt, RoundReport, Score
from raylign.run.directory import RunDirectory
from raylign.run.tables import write_candidates, write_preferences
from raylign.tracking.feed import MlflowFeed
from raylign.tracking.journal import Journal
from raylign.tracking.tracker import Tracker

TRACKING = {"experiment": "tests", "traced_preferences": 0.7}
CONFIG = parse_config({"run": {"name": "demo"}, "tracking": TRACKING})
ATTACK = "<script>alert(1)</script>"
DIGEST = "0123456789abcdef" * 4
EVENTS = 25
PROMPTS = tuple(
    Prompt(f"h{number:06d}", ({"role": "user", "content": f"question {number}"},), (1,)) for number in range(3)
)


def evaluation(score: float) -> Evaluation:
    return Evaluation(score, score - 0.1, score + 0.1, 0.02, 40.0, 0.8, 0.9, completions=32, unscored=0)


def start(tracker: Tracker, run_dir: Path, config: OnlineDpoConfig = CONFIG) -> None:
    tracker.run_started(config, {"git.sha": "abc123", "version.torch": "2.13.0", "source": "recipe.yaml"})
    (run_dir / "config.yaml").write_text(dump_config(config))
    tracker.artifact(run_dir / "config.yaml", "config")
    tracker.prompts("embedded:review-topics", "train", DIGEST, {"train": 100, "held_out": 32})
    RunDirectory(run_dir).write_baseline(evaluation(0.1))
    tracker.baseline(evaluation(0.1))


def candidate(prompt: Prompt, place: int, version: int, text: str) -> Candidate:
    return Candidate(prompt.id, place, (3,), (-0.1,), text, "stop", version, 1)


def write_held_out(path: Path, prompts: Sequence[Prompt], index: int) -> None:
    """One completion of each prompt; prompt i scores index + i / 1000, but the second is unscored."""
    found = [candidate(prompt, 0, index, f"answer {number} {ATTACK}") for number, prompt in enumerate(prompts)]
    scores = [Score(index + number / 1000, {"part": 0.5}) for number in range(len(prompts))]
    scores[1] = Score(None, {}, "no answer within 5 s")
    write_candidates(path, prompts, found, scores)


def play_round(tracker: Tracker, run_dir: Path, index: int) -> None:
    tracker.round_started(index)
    tracker.stage(index, "sample", 2.5)
    folder = run_dir / "rounds" / f"{index:04d}"
    folder.mkdir(parents=True)
    pairs = [(candidate(prompt, 0, index, ATTACK), candidate(prompt, 1, index, "worse")) for prompt in PROMPTS]
    preferences = [
        Preference(prompt, pair, (0.9, 0.2), (1.0, 1.0)) for prompt, pair in zip(PROMPTS, pairs, strict=True)
    ]
    write_preferences(folder / "preferences.parquet", preferences)
    tracker.artifact(folder / "preferences.parquet", "preferences", index)
    steps = tuple({"loss": 0.7 - 0.1 * step * index, "rewards/margins": 0.5 * step} for step in (1, 2))
    for step, metrics in enumerate(steps, 1):
        tracker.step(index, step, metrics)
    tracker.stage(index, "train", 1.5)
    (folder / "samples.jsonl").write_text(json.dumps({"text": f"{ATTACK}\ud800"}) + "\n")
    tracker.artifact(folder / "samples.jsonl", "samples", index)
    write_held_out(folder / "samples.parquet", PROMPTS, index)
    tracker.artifact(folder / "samples.parquet", "samples", index)
    seconds = {"sample": 2.5, "train": 1.5}
    counts = {"candidates": 8, "preferences": 3}
    gaps = {"logprob_gap_mean": 0.01}
    scoring = {"judge/latency_mean_s": 0.5, "judge/failures_no_answer_within_5_s": index}
    tracker.system({"cpu_utilization_percentage": 10.0 * index})
    report = RoundReport(index, index, counts, steps, gaps, evaluation(0.1 + 0.2 * index), seconds, scoring)
    RunDirectory(run_dir).write_report(report)
    tracker.round_finished(report)


def play_run(tracker: Tracker, run_dir: Path) -> None:
    start(tracker, run_dir)
    play_round(tracker, run_dir, 1)
    play_round(tracker, run_dir, 2)


def open_run(run_dir: Path, uri: str) -> Tracker:
    return Tracker(Journal(run_dir / "events.jsonl"), MlflowFeed(run_dir, uri, "tests"))


def all_runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def campaign_and_rounds(client: MlflowClient) -> tuple[Run, list[Run]]:
    runs = all_runs(client)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    rounds = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(rounds) == len(runs) - 1
    return parents[0], sorted(rounds, key=lambda run: (int(run.data.tags["raylign.round"]), run.info.start_time))


def history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 6)) for point in client.get_metric_history(run.info.run_id, key)]


def assert_recorded_once(client: MlflowClient) -> None:
    """Every curve of `play_run` has exactly its points."""
    parent, rounds = campaign_and_rounds(client)
    assert [run.data.tags["raylign.round"] for run in rounds] == ["1", "2"]
    assert [run.info.status for run in [parent, *rounds]] == ["FINISHED"] * 3
    assert history(client, parent, "eval/score") == [(0, 0.1), (1, 0.3), (2, 0.5)]
    assert history(client, parent, "eval/score_low") == [(0, 0.0), (1, 0.2), (2, 0.4)]
    assert history(client, parent, "loss") == [(1, 0.55), (2, 0.4)]
    assert history(client, parent, "run/seconds/sample") == [(1, 2.5), (2, 2.5)]
    assert history(client, parent, "run/counts/preferences") == [(1, 3), (2, 3)]
    assert history(client, parent, "run/sync/logprob_gap_mean") == [(1, 0.01), (2, 0.01)]
    assert history(client, parent, "run/scoring/judge/latency_mean_s") == [(1, 0.5), (2, 0.5)]
    assert history(client, parent, "run/scoring/judge/failures_no_answer_within_5_s") == [(1, 1), (2, 2)]
    assert history(client, parent, "run/policy_version") == [(1, 1), (2, 2)]
    assert [value for _, value in history(client, parent, "system/cpu_utilization_percentage")] == [10.0, 20.0]
    for index, run in enumerate(rounds, 1):
        assert history(client, run, "loss") == [(1, round(0.7 - 0.1 * index, 6)), (2, round(0.7 - 0.2 * index, 6))]
        assert history(client, run, "rewards/margins") == [(1, 0.5), (2, 1.0)]
        assert history(client, run, "run/seconds/train") == [(index, 1.5)]
        assert history(client, run, "run/eval/drift/kl") == [(index, 0.02)]
        assert history(client, run, "run/counts/candidates") == [(index, 8)]
    traces = all_traces(client)
    found = Counter((trace.info.tags["mlflow.traceName"], trace.info.tags["round"]) for trace in traces)
    assert found == {(name, index): count for index in "12" for name, count in (("held-out", 3), ("preference", 2))}
    for trace in traces:
        assert trace.info.trace_metadata["mlflow.sourceRun"] == parent.info.run_id
        assert [span.name for span in trace.data.spans] == [trace.info.tags["mlflow.traceName"]]
        names = sorted(feedback.name for feedback in trace.info.assessments)
        assert names in (
            ["score", "score.part"],
            ["score"],
            ["training.chosen", "training.margin", "training.rejected"],
        )


def all_traces(client: MlflowClient, condition: str | None = None, *, spans: bool = True) -> list[Trace]:
    """With their spans, which all of them must have by then, or without."""
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = client.search_traces(
        locations=[experiment.experiment_id], filter_string=condition, max_results=500, include_spans=spans
    )
    return list(found)
