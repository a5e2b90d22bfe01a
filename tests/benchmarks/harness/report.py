"""How every benchmark ends: a table, the required ratios, a JSON file, and a status that says whether they hold."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from raylign.tracking.facts import run_facts
from tests.benchmarks.harness.children import ROOT, Outcome, Stage

_BUSY = 0.5
RESULTS = ROOT / "runs" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Check:
    """A required ratio or bound; `kind` says on which side of `limit` the value must be."""

    what: str
    value: float
    kind: Literal["at least", "at most"]
    limit: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.kind == "at least" else self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok  " if self.holds else "MISS"
        return f"{verdict} {self.what}: {self.value:.4g}{self.unit}, {self.kind} {self.limit:.4g}{self.unit}"


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """First column left, the others right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, header in enumerate(headers):
        made.add_column(Text(header), justify="right" if number else "left")
    for row in rows:
        made.add_row(*[Text(cell if isinstance(cell, str) else f"{cell:.4g}") for cell in row])
    return made


def machine(stage: Stage) -> dict[str, Any]:
    """What the numbers depend on beside the code; says so when other programs are at work."""
    load = os.getloadavg()[0]
    if load > _BUSY * stage.threads:
        stage.say(f"note: the load average is {load:.1f}: other programs run, timings will be wrong")
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        **run_facts(),
        "version.trl": version("trl"),
        "cpu": names[0] if names else platform.processor(),
        "threads": stage.threads,
        "load_average_at_start": load,
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def plain(outcomes: Mapping[str, Outcome[Any]]) -> dict[str, Any]:
    """Every contestant's result with what was seen from outside, for the JSON file."""
    return {
        name: {"process_s": outcome.seconds, "memory_bytes": asdict(outcome.memory), **outcome.result.model_dump()}
        for name, outcome in outcomes.items()
    }


def results_folder(name: str) -> Path:
    """A new folder for the logs of this measurement; its JSON file is `<folder>.json`."""
    return RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def finish(
    console: Console,
    folder: Path,
    tables: Sequence[RenderableType],
    checks: Sequence[Check],
    record: Mapping[str, Any],
) -> None:
    """Show and save everything; exits with status 1 when a check is missed."""
    for part in tables:
        console.print(part)
    for check in checks:
        console.print(str(check), markup=False, highlight=False, soft_wrap=True)
    path = folder.with_suffix(".json")
    verdicts = [asdict(check) | {"holds": check.holds} for check in checks]
    path.write_text(json.dumps({"benchmark": folder.name, **record, "checks": verdicts}, indent=1), encoding="utf-8")
    console.print(f"results: {path}", markup=False, highlight=False, soft_wrap=True)
    missed = [check for check in checks if not check.holds]
    if missed:
        console.print(f"{len(missed)} of {len(checks)} requirements missed", style="red", highlight=False)
        sys.exit(1)
