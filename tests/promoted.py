"""Run directories for `raylign promote`: policies with checkpoints, held-out answers, and an evaluation of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raylign.config import EvaluateConfig, OfflineDpoConfig, OnlineDpoConfig, parse_config
from raylign.config.load import parse_tree
from raylign.evaluation.comparison import Comparison, Opponent
from raylign.evaluation.intervals import share_interval
from raylign.evaluation.win_rate import WinRate
from raylign.records import Candidate, Evaluation, HeldOutEvaluation, Prompt, RoundReport, Score
from raylign.run.directory import RunDirectory, create_run
from raylign.run.fingerprints import model_digest
from raylign.run.inputs import Input, keep
from raylign.run.tables import write_candidates

BASELINE = Evaluation(0.2, 0.1, 0.3, 0.0, 40.0, 0.8, 0.6, completions=20, unscored=0)
WEIGHTS = "adapter_model.safetensors"


def save_answers(file: Path, questions: Sequence[str], scores: Sequence[float | None]) -> None:
    """One answer to each question; a question with a `|` has a system message before it."""
    prompts = [Prompt(f"h{number:06d}", tuple(_messages(text)), (1, 2)) for number, text in enumerate(questions)]
    candidates = [Candidate(prompt.id, 0, (3,), (-0.5,), "an answer", "stop", 0, 7) for prompt in prompts]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_candidates(
        file, prompts, candidates, [Score(score, {}, "" if score is not None else "-") for score in scores]
    )


def _messages(text: str) -> list[Mapping[str, str]]:
    *system, question = text.split("|")
    return [*({"role": "system", "content": one} for one in system), {"role": "user", "content": question}]


def run_config(parent: Path, name: str = "demo", **blocks: Any) -> OnlineDpoConfig:
    tree = {"run": {"name": name, "dir": str(parent)}, "schedule": {"rounds": 4}, **blocks}
    return parse_config(tree)


def offline_run(parent: Path, name: str = "offline", **blocks: Any) -> tuple[OfflineDpoConfig, RunDirectory]:
    """A finished run of one round on a data set, with its checkpoint."""
    tree = {
        "run": {"name": name, "dir": str(parent)},
        "data": {"source": str(parent / "rows.jsonl"), "held_out": 2},
        **blocks,
    }
    config = parse_tree(tree, OfflineDpoConfig, "test")
    directory = create_run(config.run, config)
    rows = HeldOutEvaluation("rewards/accuracies", 0.7, 0.6, 0.8, 20, {"loss": 0.6})
    directory.write_baseline(rows)
    add_checkpoint(directory, 1)
    directory.write_report(RoundReport(1, 1, {"preferences": 1}, (), {}, rows, {}))
    return config, directory


def add_checkpoint(directory: RunDirectory, version: int) -> None:
    with directory.checkpoint_store(None).new(version, (), True, 0) as folder:
        (folder / WEIGHTS).write_bytes(bytes([version]) * 8)


def new_run(config: OnlineDpoConfig, questions: int = 20) -> RunDirectory:
    """A run before its first round: every held-out answer scores 0."""
    directory = create_run(config.run, config)
    directory.write_baseline(BASELINE)
    save_answers(directory.round(0) / "samples.parquet", held_out(questions), [0.0] * questions)
    return directory


def held_out(questions: int) -> list[str]:
    return [f"Held out {number}?" for number in range(questions)]


def add_round(directory: RunDirectory, index: int, scores: Sequence[float | None], **changed: Any) -> None:
    """A finished round with a checkpoint, whose version gives held-out answers of these scores."""
    save_answers(directory.round(index) / "samples.parquet", held_out(len(scores)), scores)
    save_answers(directory.round(index) / "candidates.parquet", [f"Train {index}?"], [0.5])
    add_checkpoint(directory, index)
    evaluation = Evaluation(**(asdict(BASELINE) | changed))
    directory.write_report(RoundReport(index, index, {"preferences": 1}, (), {}, evaluation, {}))


def evaluate(
    parent: Path,
    policy: str,
    against: str,
    questions: Sequence[str],
    wins: int,
    checkpoint: Path,
) -> Path:
    """A finished run of the recipe evaluate, of which the first `wins` questions are won."""
    run = {"name": f"evaluate-{len([*parent.glob('evaluate-*')])}", "dir": str(parent)}
    config = parse_tree({"run": run, "policy": {"type": "run", "run": "x"}}, EvaluateConfig, "test")
    directory = create_run(config.run, config)
    scores = [float(number < wins) for number in range(len(questions))]
    low, high = (float(bound) for bound in share_interval(np.array(scores), 0.95))
    rate, count = wins / len(questions), len(questions)
    won = WinRate(rate, low, high, rate, 0.0, 1 - rate, rate, low, high, count)
    found = Comparison(policy, "gold", count, 0.95, BASELINE, {"other": Opponent(against, won, {})})
    save_answers(directory.round(0) / "candidates.parquet", questions, scores)
    (directory.path / "report.json").write_text(json.dumps(asdict(found)))
    keep(directory.path, {"policy": Input("0" * 64 + model_digest(checkpoint), "files of policy", fixed=True)})
    return directory.path
