"""Can raylign run here? Every check with what was found and, if anything is wrong, the cure."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from recipes.commands.checks.accelerators import gpu_check, model_checks, package_checks, probe
from recipes.commands.checks.machine import Check, Status, disk_checks, machine_checks
from recipes.commands.checks.ray_cluster import mlflow_check, ray_checks

STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
DEFAULT_STORE = "sqlite:///runs/mlflow.db"
PLAIN_WIDTH = 160


def examine(tracking_uri: str) -> list[Check]:
    """All checks, in the order of the table. Takes some seconds: torch is imported, addresses are tried."""
    checks = [*package_checks(), *machine_checks()]
    found = probe()
    if isinstance(found, Check):
        checks.append(found)
    else:
        checks += [gpu_check(found), *disk_checks(found.cache), *model_checks(found)]
    return [*checks, *ray_checks(os.environ, Path.home()), mlflow_check(tracking_uri)]


def show(checks: Sequence[Check], console: Console) -> None:
    """The table, then how many checks warn and fail."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for header in ("check", "", "found", "cure"):
        table.add_column(header, overflow="fold")
    for check in checks:
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(Text(check.name), status, Text(check.found), Text(check.cure))
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in STYLES}
    console.print(Text(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} that stop a run"))


def doctor(tracking_uri: str, console: Console) -> bool:
    """Print the table; true when nothing stops a run."""
    columns = (SpinnerColumn(), TextColumn("looking around"))
    # Not `console.status`: it would print on the console what libraries write to stdout meanwhile.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as spinner:
        spinner.add_task("")
        checks = examine(tracking_uri)
    show(checks, console)
    return all(check.status != "fail" for check in checks)
