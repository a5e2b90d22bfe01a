"""A raw file of preferences to a trained adapter in one command, and its held-out accuracy beside the untrained one."""

from pathlib import Path
from typing import Annotated

import typer

from raylign.records import HeldOutEvaluation
from raylign.reporting import report_console
from raylign.rundir import RunDirectory
from tests.benchmarks.harness.children import ROOT, raylign
from tests.benchmarks.harness.report import Check, finish, results_folder, table

NAME = "data_demos"
RECIPE = ROOT / "recipes/offline_dpo_smollm2.yaml"
SHARED = ROOT.parent / "shared/data"
SETTINGS = ("data.max_length=256", "data.held_out=48", "schedule.num_train_epochs=2", "schedule.rounds_per_epoch=1")


def main(
    sources: Annotated[
        list[Path] | None, typer.Argument(help="Files of preferences; else those of LLaMA-Factory.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of the adapter.")] = 2e-4,
) -> None:
    """Run offline DPO on each file: the share of held-out pairs ranked rightly must rise above the untrained 1/2."""
    console, folder = report_console(), results_folder(NAME)
    checks = []
    for source in sources or [SHARED / "dpo_en_demo.json", SHARED / "dpo_zh_demo.json"]:
        rate = f"trainer.learning_rate={learning_rate:g}"
        raylign(
            "run", str(RECIPE), f"data.source={source}", f"run.dir={folder}", f"run.name={source.stem}", rate, *SETTINGS
        )
        directory = RunDirectory(folder / source.stem)
        before, after = directory.baseline(), directory.reports()[-1].evaluation
        assert isinstance(before, HeldOutEvaluation) and isinstance(after, HeldOutEvaluation)
        checks.append(
            Check(
                f"{source.stem}: accuracy on {after.rows} held-out pairs above the untrained {before.value:.3f}",
                after.value - before.value,
                at_least=0.001,
            )
        )
        console.print(f"{source.stem}: {after.value:.3f} [{after.low:.3f}, {after.high:.3f}]")
    console.print(table(checks))
    finish(NAME, checks, {})


if __name__ == "__main__":
    typer.run(main)
