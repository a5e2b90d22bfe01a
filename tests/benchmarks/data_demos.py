"""A raw file of preferences to a trained adapter in one command: its held-out accuracy beside the untrained one."""

from pathlib import Path
from typing import Annotated

import typer

from raylign.records import HeldOutEvaluation
from raylign.report.tables import report_console
from raylign.run.directory import RunDirectory
from tests.benchmarks.harness.children import ROOT, measured
from tests.benchmarks.harness.commands import raylign
from tests.benchmarks.harness.report import Check, finish, results_folder, table
from tests.benchmarks.harness.sampled import sampled_pairs

NAME = "data_demos"
SETTINGS = ("data.max_length=1024", "data.held_out=80", "schedule.rounds_per_epoch=1")
SAMPLED, SAMPLED_TOKENS = 240, 48
"""Pairs, and tokens of a completion, where no file is given."""


def main(
    sources: Annotated[
        list[Path] | None, typer.Argument(exists=True, dir_okay=False, help="Files of preferences; else sampled pairs.")
    ] = None,
) -> None:
    """Run offline DPO on each file: more held-out pairs must be ranked rightly than the untrained 1/2, at less loss."""
    console, folder = report_console(), results_folder(NAME)
    folder.mkdir(parents=True)
    checks: list[Check] = []
    rows: list[list[object]] = []
    with measured(NAME):
        for source in sources or [sampled_pairs(SAMPLED, SAMPLED_TOKENS, console.print)]:
            recipe = ROOT / "recipes/offline_dpo_smollm2.yaml"
            place = (f"data.source={source}", f"run.dir={folder}", f"run.name={source.stem}")
            seconds = raylign(console, folder / f"{source.stem}.log", "run", str(recipe), *place, *SETTINGS)
            before, after = _evaluations(RunDirectory(folder / source.stem))
            rows.append([source.stem, *_cells(before), *_cells(after), seconds])
            checks += _checks(f"{source.stem}: {after.rows} held-out pairs", before, after)
    headers = ["file", "accuracy\nbefore", "loss\nbefore", "accuracy\nafter", "loss\nafter", "seconds"]
    finish(console, folder, [table("offline DPO", headers, rows)], checks, {"settings": SETTINGS, "rows": rows})


def _evaluations(directory: RunDirectory) -> tuple[HeldOutEvaluation, HeldOutEvaluation]:
    before, after = directory.baseline(), directory.reports()[-1].evaluation
    assert isinstance(before, HeldOutEvaluation) and isinstance(after, HeldOutEvaluation)
    return before, after


def _checks(what: str, before: HeldOutEvaluation, after: HeldOutEvaluation) -> list[Check]:
    losses = before.metrics["loss"], after.metrics["loss"]
    return [
        Check(f"{what}, accuracy gained", after.value - before.value, "at least", 0.001),
        Check(f"{what}, loss taken off", losses[0] - losses[1], "at least", 0.001),
    ]


def _cells(evaluation: HeldOutEvaluation) -> list[object]:
    return [f"{evaluation.value:.3f} [{evaluation.low:.3f}, {evaluation.high:.3f}]", evaluation.metrics["loss"]]


if __name__ == "__main__":
    typer.run(main)
