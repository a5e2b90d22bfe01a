"""A reward model from the policy's own samples: against length alone, then as the scorer of online DPO."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from raylign.config import RewardModelConfig, load_config
from raylign.data.preferences import load_preferences
from raylign.models import end_ids, load_tokenizer, resolve_model
from raylign.records import HeldOutEvaluation, Preference
from raylign.report.tables import report_console
from raylign.run.directory import RunDirectory
from tests.benchmarks.harness.children import ROOT, measured
from tests.benchmarks.harness.commands import raylign
from tests.benchmarks.harness.report import Check, finish, results_folder, table

Row = dict[str, Any]

NAME = "reward_model"
ONLINE, REWARD = ROOT / "recipes/sentiment_smollm2.yaml", ROOT / "recipes/reward_model_smollm2.yaml"
GAP = 0.4
"""Least difference of VADER's scores in a pair."""
SAMPLED = ("schedule.rounds=1", "schedule.prompts_per_round=96", "sampling.num_generations=32", "prompts.held_out=8")
TRAINED = ("data.max_length=192", "data.held_out=160", "schedule.num_train_epochs=2", "schedule.rounds_per_epoch=1")
DRIVEN = ("pairing.min_margin=0", "evaluation.num_generations=4")


def main(rounds: Annotated[int, typer.Option(help="Of online DPO on the reward model.")] = 3) -> None:
    """Sample, label with VADER, train the reward model on one part of the prompts, rank the other, drive online DPO."""
    console, folder = report_console(), results_folder(NAME)
    folder.mkdir(parents=True)
    place = f"run.dir={folder}"
    with measured(NAME):
        raylign(console, folder / "samples.log", "run", str(ONLINE), place, "run.name=samples", *SAMPLED)
        source = _label(RunDirectory(folder / "samples").round(1) / "candidates.parquet", folder / "pairs.jsonl")
        settings = (f"data.source={source}", place, "run.name=reward", *TRAINED)
        raylign(console, folder / "reward.log", "run", str(REWARD), *settings)
        raylign(console, folder / "export.log", "export", str(folder / "reward"), "--to", str(folder / "exported"))
        scoring = f"scoring={{type: reward_model, path: {folder / 'exported'}}}"
        online = (place, "run.name=online", scoring, f"schedule.rounds={rounds}", *DRIVEN)
        raylign(console, folder / "online.log", "run", str(ONLINE), *online)
    accuracy = RunDirectory(folder / "reward").reports()[-1].evaluation
    assert isinstance(accuracy, HeldOutEvaluation)
    by_length = _length_accuracy(_held_out(settings))
    directory = RunDirectory(folder / "online")
    sentiment = [_sentiment(directory.round(index) / "samples.parquet") for index in (0, rounds)]
    reward = [_reward(directory.round(index) / "samples.parquet") for index in (0, rounds)]
    rows: list[Sequence[object]] = [
        ["reward model", f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]"],
        ["length alone, the better of longer and shorter", by_length],
        ["ECE of the reward model", accuracy.metrics["calibration/ece"]],
        ["held-out reward before and after online DPO", f"{reward[0]:.3f} {reward[1]:.3f}"],
        ["held-out VADER score before and after", f"{sentiment[0]:.3f} {sentiment[1]:.3f}"],
    ]
    checks = [
        Check("accuracy of the reward model above that of length alone", accuracy.value - by_length, "at least", 0.001),
        Check(
            "held-out VADER score gained by training on the reward model",
            sentiment[1] - sentiment[0],
            "at least",
            0.001,
        ),
    ]
    shown = table(f"{accuracy.rows} held-out pairs", ["what", "value"], rows)
    finish(console, folder, [shown], checks, {"rows": rows, "metrics": dict(accuracy.metrics)})


def _label(candidates: Path, path: Path) -> Path:
    """Best with worst, second with last but one, and so on while VADER's scores differ enough: a file in TRL's format.

    No answer is in two pairs, so that a reward model can not pass by remembering answers.
    """
    groups: dict[str, list[Row]] = {}
    for row in pq.read_table(candidates).to_pylist():
        groups.setdefault(row["messages"], []).append(row)
    rows = [
        {"prompt": json.loads(messages), "chosen": _turn(better), "rejected": _turn(worse)}
        for messages, members in groups.items()
        for better, worse in _folded(sorted(members, key=lambda row: -row["score"]))
        if better["score"] - worse["score"] >= GAP
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _folded(ranked: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    return zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)


def _turn(row: Row) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": row["text"]}]


def _held_out(settings: Sequence[str]) -> Sequence[Preference]:
    """The pairs that the run held out."""
    config = load_config(REWARD, settings, kind=RewardModelConfig)
    folder = resolve_model(config.model.path)
    tokenizer = load_tokenizer(folder)
    ends = end_ids(tokenizer, [Path(folder)])
    return load_preferences(
        config.data, tokenizer, ends=ends, rows=config.rows, seed=config.run.seed, refused_to=None
    ).held_out


def _length_accuracy(pairs: Sequence[Preference]) -> float:
    gaps = [len(pair.candidates[0].token_ids) - len(pair.candidates[1].token_ids) for pair in pairs]
    longer = fmean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
    return max(longer, 1 - longer)


def _sentiment(samples: Path) -> float:
    analyser = SentimentIntensityAnalyzer()
    return fmean(analyser.polarity_scores(row["text"])["compound"] for row in pq.read_table(samples).to_pylist())


def _reward(samples: Path) -> float:
    return fmean(row["score"] for row in pq.read_table(samples).to_pylist() if row["score"] is not None)


if __name__ == "__main__":
    typer.run(main)
