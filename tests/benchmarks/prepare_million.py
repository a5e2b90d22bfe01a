"""`raylign data prepare` on a million rated rows: rows a second, and memory beside that for a tenth of the rows."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from raylign.report.tables import report_console
from tests.benchmarks.harness.children import ROOT, Stage
from tests.benchmarks.harness.judged import write_rows
from tests.benchmarks.harness.report import Check, finish, machine, results_folder, table

MAX_BYTES_PER_ROW = 256
"""What a further row may add to the peak: keys take about thirty bytes, sorting them a few times as much."""
MAX_MIB = 1024
_COUNTS = ("kept", "exact\nduplicates", "near\nduplicates")
COLUMNS = ("rows", "rows/s", "rows per\nCPU s", "s", "peak RSS\nMiB", "its own\nMiB", *_COUNTS)


def main(
    rows: Annotated[int, typer.Option(min=200_000, help="Rows of the large file; the small has a tenth.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Seeds the rows.")] = 0,
    scratch: Annotated[Path | None, typer.Option(help="Where the files go; about 1 GB for a million rows.")] = None,
) -> None:
    """Write rated rows in English and Chinese with duplicates and templates, prepare them, and remove everything."""
    folder = results_folder("prepare_million")
    stage = Stage(report_console(), folder, threads=1)
    facts, measured = machine(stage), []
    for count in (rows // 10, rows):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=scratch) as work:
            stage.say(f"writing {count:,} rows")
            made = write_rows(Path(work, "rows.jsonl"), count, seed)
            measured.append(_prepare(stage, Path(work), folder / f"{count}.log") | {"made": made})
            stage.say(f"{count:,} rows: {measured[-1]['seconds']:.0f} s")
    small, large = measured
    cells = [_cells(one) for one in measured]
    shown = table("prepared from JSONL, two rated answers a row, on one core", COLUMNS, cells)
    record = {"machine": facts, "rows": rows, "seed": seed, "runs": measured}
    finish(stage.console, folder, [shown], _checks(small, large), record)


def _prepare(stage: Stage, work: Path, log: Path) -> dict[str, Any]:
    """The real command in a process of its own; its report and the peak that the kernel saw."""
    settings = [f"sources=[{{source: {work / 'rows.jsonl'}, format: ultrafeedback}}]", f"output={work / 'out'}"]
    recipe = ROOT / "recipes" / "data" / "prepare_demo.yaml"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.commands.cli", "data", "prepare", str(recipe), *settings],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        stage.say(log.read_text(encoding="utf-8", errors="replace"))
        raise SystemExit(f"prepare_million: the command ended with status {os.waitstatus_to_exitcode(status)}")
    report: dict[str, Any] = json.loads((work / "out" / "report.json").read_bytes())
    return report | {"kernel_peak_bytes": usage.ru_maxrss * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}


def _cells(run: dict[str, Any]) -> list[object]:
    pairs = run["pairs"]
    memory = [run["kernel_peak_bytes"] / 2**20, run["peak_rss_bytes"] / 2**20]
    counts = [f"{pairs[fate]:,}" for fate in ("kept", "exact_duplicate", "near_duplicate")]
    speeds = [f"{run['rows_per_s']:,.0f}", f"{_rows(run) / run['cpu_s']:,.0f}"]
    return [f"{_rows(run):,}", *speeds, run["seconds"], *memory, *counts]


def _rows(run: dict[str, Any]) -> int:
    return sum(run["rows"].values())


def _checks(small: dict[str, Any], large: dict[str, Any]) -> list[Check]:
    grown = (large["kernel_peak_bytes"] - small["kernel_peak_bytes"]) / (_rows(large) - _rows(small))
    checks = [
        Check("peak RSS", large["kernel_peak_bytes"] / 2**20, "at most", MAX_MIB, " MiB"),
        Check("peak RSS of each further row", grown, "at most", MAX_BYTES_PER_ROW, " bytes"),
    ]
    for run in (small, large):
        for fate in ("exact_duplicate", "template", "short"):
            wanted = run["made"][fate]
            checks.append(
                Check(f"{fate} of {_rows(run):,} rows, off by", abs(run["pairs"][fate] - wanted), "at most", 0)
            )
        found = run["pairs"]["near_duplicate"] / run["made"]["near_duplicate"]
        checks.append(Check(f"near duplicates found among {_rows(run):,} rows", 100 * found, "at least", 95, " %"))
    return checks


if __name__ == "__main__":
    typer.run(main)
