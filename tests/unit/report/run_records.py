"""A run directory as a run with samples leaves it, without engines."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raylign.config import OnlineDpoConfig, parse_config
from raylign.records import Candidate, Evaluation, Prompt, RoundReport, Score
from raylign.run.directory import RunDirectory, create_run
from raylign.run.tables import write_candidates
from raylign.tracking.journal import JOURNAL_NAME, Journal

PROMPTS = 20
BASELINE = Evaluation(0.2, 0.1, 0.3, 0.0, 40.0, 0.8, 0.6, completions=PROMPTS, unscored=0, kl_initial=0.0)
COUNTS = {"prompts": 8, "candidates": 32, "unscored": 2, "truncated": 5, "preferences": 6, "ties": 2}
STEPS = (
    {"loss": 0.69, "rewards/margins": 0.0, "rewards/accuracies": 0.5},
    {"loss": 0.5, "rewards/margins": 0.4, "rewards/accuracies": 0.9},
)
SECONDS = {"sample": 4.0, "train": 3.0}


def config_of(parent: Path, name: str = "demo", rounds: int = 3) -> OnlineDpoConfig:
    return parse_config({"run": {"name": name, "dir": str(parent)}, "schedule": {"rounds": rounds}})


def evaluated(score: float) -> Evaluation:
    return replace(BASELINE, score=score, score_low=score - 0.1, score_high=score + 0.1, kl=2.5, kl_initial=2.5)


def report(index: int, score: float) -> RoundReport:
    return RoundReport(index, index, COUNTS, STEPS, {}, evaluated(score), SECONDS)


def save_answers(folder: Path, scores: Sequence[float | None], text: str = "an answer", question: str = "Why?") -> None:
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": question},), (1, 2)) for i in range(len(scores))]
    candidates = [Candidate(prompt.id, 0, (3,), (-0.5,), text, "stop", 0, 7) for prompt in prompts]
    folder.mkdir(parents=True, exist_ok=True)
    reasons = [Score(score, reason="" if score is not None else text) for score in scores]
    write_candidates(folder / "samples.parquet", prompts, candidates, reasons)


def save_run(parent: Path, gains: Sequence[float], name: str = "demo", text: str = "an answer") -> RunDirectory:
    """Two rounds of three; `gains[i]` is by how much the score of held-out answer i rises in all."""
    config = config_of(parent, name)
    directory = create_run(config.run, config)
    directory.write_baseline(BASELINE)
    before = [0.1 * (i % 5) for i in range(len(gains))]
    save_answers(directory.round(0), before, text)
    for index in (1, 2):
        directory.round(index).mkdir(parents=True)
        directory.write_report(report(index, 0.3 * index))
    after = [score + gain for score, gain in zip(before, gains, strict=True)]
    save_answers(directory.round(2), after, f"{text} after")
    with Journal(directory.path / JOURNAL_NAME) as journal:
        journal.append("incident", {"role": "trainer", "happened": "lost", "round": 2, "count": 1, "why": text})
    return directory
