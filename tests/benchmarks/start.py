"""From `raylign run` to a team that is ready, and `raylign plan`: how long people wait, beside another checkout."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from raylign.report.tables import report_console
from tests.benchmarks.harness.children import ROOT, ContestantError, Stage, measured
from tests.benchmarks.harness.report import Check, cores, finish, machine, results_folder, table

READY = "team ready"
_POLL_S = 0.1
_LONGEST_S = 600.0


def main(
    recipe: Annotated[Path, typer.Option(help="An online recipe.")] = Path("recipes/sentiment_smollm2.yaml"),
    repeats: Annotated[int, typer.Option(min=1, help="Starts and plans of each checkout, in turn.")] = 3,
    beside: Annotated[Path | None, typer.Option(help="Another checkout that is set up: the peer.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the recipe; may be given often.")] = None,
    limit: Annotated[float, typer.Option(help="The start's share of the other checkout's, at most.")] = 1.05,
) -> None:
    """Every checkout runs its own `.venv/bin/raylign` with the same recipe, after a plan that fills the file cache."""
    folder = results_folder("start")
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stage(report_console(), folder, cores())
    facts = machine(stage)
    checkouts = {"this checkout": ROOT} | ({str(beside): beside.resolve()} if beside else {})
    starts: dict[str, list[float]] = {name: [] for name in checkouts}
    plans: dict[str, list[float]] = {name: [] for name in checkouts}
    with measured("start"):
        for name, root in checkouts.items():
            plan(root, recipe, setting or [])
            stage.say(f"{name}: {root}")
        for number in range(repeats):
            for name, root in checkouts.items():
                plans[name].append(plan(root, recipe, setting or []))
                run = folder / f"{root.name}-{number}"
                starts[name].append(start(root, recipe, [*(setting or []), f"run.dir={run}"], run.with_suffix(".log")))
                stage.say(f"{name}: ready after {starts[name][-1]:.1f} s, plan in {plans[name][-1]:.1f} s")
    rows = [
        [name, *(f"{median(of):.1f} ({min(of):.1f} to {max(of):.1f})" for of in (starts[name], plans[name]))]
        for name in checkouts
    ]
    required = []
    if beside:
        ratio = median(starts["this checkout"]) / median(starts[str(beside)])
        required = [Check("launch to team ready, share of the other checkout's", ratio, "at most", limit)]
    headers = ["", f"`raylign run` to {READY!r}, s", "`raylign plan`, s"]
    shown = [table("median (least to most)", headers, rows)]
    finish(stage.console, folder, shown, required, {"machine": facts, "starts": starts, "plans": plans})


def plan(root: Path, recipe: Path, settings: list[str]) -> float:
    """Seconds of `raylign plan`. Raises ContestantError."""
    began = time.monotonic()
    words = [*raylign(root), "plan", str(recipe), *settings]
    done = subprocess.run(words, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContestantError(f"{root}: raylign plan ended with status {done.returncode}: {done.stderr}")
    return time.monotonic() - began


def start(root: Path, recipe: Path, settings: list[str], log: Path) -> float:
    """Seconds until the run says that its team is ready; it is stopped then. Raises ContestantError."""
    began = time.monotonic()
    words = [*raylign(root), "run", str(recipe), *settings]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, cwd=root, env=environment(root), stdout=out, stderr=out, start_new_session=True
        )
    try:
        while READY not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() - began > _LONGEST_S:
                raise ContestantError(f"{root}: no team; see {log}")
            time.sleep(_POLL_S)
        return time.monotonic() - began
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        process.wait()


def raylign(root: Path) -> list[str]:
    python = Path(sys.executable) if root == ROOT else root / ".venv/bin/python"
    return [str(python), str(python.with_name("raylign"))]


def environment(root: Path) -> dict[str, str]:
    """The checkout's own code, wherever its environment was installed from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)])}


if __name__ == "__main__":
    typer.run(main)
