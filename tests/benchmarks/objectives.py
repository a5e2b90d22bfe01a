"""Objectives side by side on the demo's task: DPO of best against worst, Plackett-Luce over six, GRPO and GSPO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from raylign.records import Evaluation, Score
from raylign.report.tables import report_console
from raylign.run.directory import RunDirectory
from raylign.run.tables import read_candidates
from tests.benchmarks.harness.children import ROOT, Stage, measured
from tests.benchmarks.harness.commands import raylign
from tests.benchmarks.harness.precision import Values, shown
from tests.benchmarks.harness.report import Check, cores, finish, machine, results_folder, table

PAIRS, GROUPS = ROOT / "recipes/sentiment_smollm2.yaml", ROOT / "recipes/grpo_smollm2.yaml"
OBJECTIVES: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    "DPO, best against worst": (PAIRS, ()),
    "Plackett-Luce over 6": (PAIRS, ("pairing={type: ranking, min_margin: 0.2}", "loss={loss_type: plackett_luce}")),
    "GRPO": (GROUPS, ()),
    "GSPO": (
        GROUPS,
        ("loss={loss_type: grpo, importance_sampling_level: sequence, epsilon: 3.0e-4, epsilon_high: 4.0e-4}",),
    ),
}


@dataclass(frozen=True, slots=True)
class Version:
    """A policy version of one run: what it had cost, and the held-out scores and KL that it came to.

    `seconds` are those of all stages before it but evaluation, `scores` [prompts] means over a prompt's completions.
    """

    seconds: float
    scores: Values
    kl: float


Runs = Mapping[str, Sequence[Sequence[Version]]]
"""By objective and seed: versions from 0, the policy before training, to the last."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of every run.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every objective.")] = 3,
    prompts: Annotated[int, typer.Option(help="Prompts of a round.")] = 48,
    batch: Annotated[int, typer.Option(min=1, help="Preferences or groups of a step.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of a completion, at most.")] = 48,
    held_out: Annotated[int, typer.Option(help="Held-out prompts.")] = 32,
    completions: Annotated[int, typer.Option(help="Completions of a held-out prompt.")] = 4,
    folder: Annotated[Path | None, typer.Option(help="Go on where an earlier run in this folder stopped.")] = None,
    timed: Annotated[
        Path | None,
        typer.Option(
            help="Folder of runs of one seed of this benchmark on a quiet machine: rounds take what they took."
        ),
    ] = None,
) -> None:
    """Every objective gets the same prompts, candidates a prompt, steps and learning rate; each must learn."""
    folder = folder or results_folder("objectives")
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stage(report_console(), folder, cores())
    facts = machine(stage)
    shared = (
        f"run.dir={folder}",
        f"schedule.rounds={rounds}",
        f"schedule.prompts_per_round={prompts}",
        f"trainer.per_device_train_batch_size={batch}",
        f"sampling.max_new_tokens={new_tokens}",
        f"prompts.held_out={held_out}",
        f"evaluation.num_generations={completions}",
    )
    runs: dict[str, list[list[Version]]] = {name: [] for name in OBJECTIVES}
    with measured("objectives"):
        for seed in range(seeds):
            for name, (recipe, options) in OBJECTIVES.items():
                own = f"{own_name(name)}-{seed}"
                settings = (f"run.name={own}", f"run.seed={seed}", *shared, *options)
                raylign(stage.console, folder / f"{own}.log", "run", str(recipe), *settings)
                runs[name].append(versions(RunDirectory(folder / own), rounds))
    if timed is not None:
        runs = {
            name: [as_timed(of_seed, round_s(timed / f"{own_name(name)}-0")) for of_seed in runs[name]] for name in runs
        }
    budget = min(of_seed[-1].seconds for of_all in runs.values() for of_seed in of_all)
    record = {
        "machine": facts,
        "budget_s": budget,
        "runs": {
            name: [
                [{"seconds": one.seconds, "score": float(one.scores.mean()), "kl": one.kl} for one in of_seed]
                for of_seed in of_all
            ]
            for name, of_all in runs.items()
        },
    }
    drawn = f"after {rounds * prompts} prompts with 6 candidates each"
    last = {name: [of_seed[-1] for of_seed in of_all] for name, of_all in runs.items()}
    tables = [
        ends_table(drawn, runs, last),
        ends_table(f"after at most {budget:.0f} s of training", runs, within(runs, budget)),
    ]
    finish(stage.console, folder, tables, checks(runs), record)


def own_name(objective: str) -> str:
    return "".join(letter for letter in objective.lower() if letter.isalnum())


def round_s(folder: Path) -> float:
    """Seconds of a round of the run in `folder`, the mean of all of them."""
    directory = RunDirectory(folder)
    found = versions(directory, len(directory.reports()))
    return found[-1].seconds / (len(found) - 1)


def as_timed(of_seed: Sequence[Version], seconds: float) -> list[Version]:
    """Versions that took `seconds` each."""
    return [replace(one, seconds=index * seconds) for index, one in enumerate(of_seed)]


def versions(directory: RunDirectory, rounds: int) -> list[Version]:
    """Of a finished run."""
    baseline, reports, spent = directory.baseline(), directory.reports(), 0.0
    found = [_version(directory, 0, baseline, spent)]
    for report in reports[:rounds]:
        spent += sum(seconds for stage, seconds in report.seconds.items() if stage != "evaluate")
        found.append(_version(directory, report.index, report.evaluation, spent))
    return found


def _version(directory: RunDirectory, index: int, evaluation: object, seconds: float) -> Version:
    assert isinstance(evaluation, Evaluation)
    assert evaluation.kl_initial is not None, "an adapter's base is the initial policy"
    candidates, scores = read_candidates(directory.round(index) / "samples.parquet")
    by_prompt: dict[str, list[Score]] = {}
    for candidate, score in zip(candidates, scores, strict=True):
        by_prompt.setdefault(candidate.prompt_id, []).append(score)
    means = [fmean(score.value for score in of_one if score.value is not None) for of_one in by_prompt.values()]
    return Version(seconds, np.array(means), evaluation.kl_initial)


def within(runs: Runs, budget: float) -> dict[str, list[Version]]:
    """The newest version that each run had published within `budget` seconds of training."""
    return {
        name: [[one for one in of_seed if one.seconds <= budget][-1] for of_seed in of_all]
        for name, of_all in runs.items()
    }


def ends_table(title: str, runs: Runs, ends: Mapping[str, Sequence[Version]]) -> Table:
    headers = ["objective", "held-out score", "gained", "of each seed", "KL, nats", "gain a nat", "training, s"]
    rows: list[Sequence[object]] = []
    for name, of_seeds in ends.items():
        gains = [end.scores.mean() - run[0].scores.mean() for run, end in zip(runs[name], of_seeds, strict=True)]
        kl = fmean(end.kl for end in of_seeds)
        each = " ".join(f"{gain:+.3f}" for gain in gains)
        gain = fmean(gains)
        seconds = fmean(end.seconds for end in of_seeds)
        rows.append(
            [
                name,
                shown(_pooled(of_seeds), 3),
                f"{gain:+.3f}",
                each,
                f"{kl:.2f}",
                f"{gain / kl:.3f}" if kl > 0 else "-",
                f"{seconds:.0f}",
            ]
        )
    return table(title, headers, rows)


def _pooled(of_seeds: Sequence[Version]) -> Values:
    """Prompts of all seeds: an interval over them says how sure the mean of these runs is, not other seeds'."""
    pooled: Values = np.concatenate([one.scores for one in of_seeds])
    return pooled


def checks(runs: Runs) -> list[Check]:
    return [
        Check(
            f"{name}: held-out score gained",
            float(_pooled([one[-1] for one in of]).mean() - _pooled([one[0] for one in of]).mean()),
            "at least",
            0.05,
        )
        for name, of in runs.items()
    ]


if __name__ == "__main__":
    typer.run(main)
