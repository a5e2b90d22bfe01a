"""Runs side by side: what came of each, by how much it differs from the first, and in which options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylign.config import EvaluateConfig, OnlineDpoConfig
from raylign.errors import ConfigError
from raylign.records import AnyEvaluation
from raylign.report.measures import measured, shown, written
from raylign.report.record import RunRecord, read_run
from raylign.report.text import escape_control
from raylign.report.verdict import mean_gain, paired_gains, verdict
from raylign.run.directory import open_run
from raylign.tracking.facts import publishable

_NOT_COMPARED = ("run.", "tracking.", "placement.")
"""Options that decide nothing of what is learned, but for the seed."""
_NONE = "-"
_UNSET = frozenset({_NONE, "null", "[]"})


@dataclass(frozen=True, slots=True)
class Side:
    """One run: its name here, its record, and its newest evaluation."""

    name: str
    record: RunRecord
    last: AnyEvaluation


def compare_runs(paths: Sequence[Path], console: Console) -> None:
    """Print a table of results, with paired intervals against the first run, and one of the options that differ.

    Raises ConfigError for fewer than two runs, runs without a finished round, or of two kinds of evaluation.
    """
    sides = _sides(paths)
    console.print(_results(sides))
    options = differing_options([side.record for side in sides])
    if not options:
        console.print(Text("no option differs"))
        return
    table = _table("option", *(side.name for side in sides))
    for name, values in options.items():
        table.add_row(*(Text(escape_control(cell)) for cell in (name, *values)))
    console.print(table)


def _sides(paths: Sequence[Path]) -> list[Side]:
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} run to compare, at least 2 are needed: raylign compare RUN RUN ...")
    sides = []
    for path in paths:
        record = read_run(open_run(path))
        if isinstance(record.config, EvaluateConfig):
            raise ConfigError(
                f"{path} is a run of the recipe evaluate, a comparison itself; read what came of it: "
                f"raylign review show {path}"
            )
        if not record.reports:
            raise ConfigError(f"{path} has no finished round to compare; go on with it: raylign resume {path}")
        sides.append(Side(record.path.name, record, record.reports[-1].evaluation))
    kinds = {type(side.last) for side in sides}
    if len(kinds) > 1:
        raise ConfigError(
            "some of these runs are evaluated on samples, others on held-out rows; compare runs of one kind"
        )
    return sides


def _results(sides: Sequence[Side]) -> Table:
    """A run a column: measures are many, and a terminal is narrow."""
    measures = shown([side.last for side in sides])
    values = [measured(side.last) for side in sides]
    rows: list[tuple[str, list[str]]] = [
        ("verdict", [verdict(side.record).word for side in sides]),
        ("rounds", [f"{len(side.record.reports)} of {side.record.config.rounds}" for side in sides]),
        *((measure.title, [_folded(written(measure, each)) for each in values]) for measure in measures),
        ("score against the first", [_against(sides[0], side) for side in sides]),
    ]
    table = _table("run", *(side.name for side in sides))
    for title, own in rows:
        table.add_row(*(Text(escape_control(cell, keep="\n")) for cell in (title, *own)))
    return table


def _against(first: Side, side: Side) -> str:
    """Mean difference on prompts that both have scored answers to, with its interval; paired bootstrap."""
    config = side.record.config
    gains = [] if side is first else paired_gains(first.record.after, side.record.after)
    if not gains or not isinstance(config, OnlineDpoConfig):
        return "-"
    _, _, span = mean_gain(gains, config)
    return _folded(f"{span}, {len(gains)} prompts")


def _folded(cell: str) -> str:
    """An interval stands below its value: rows of many measures fit a terminal."""
    return cell.replace(" [", "\n[")


def differing_options(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """By name of an option that two of the runs have otherwise: its value in each; secrets are withheld.

    What one run does not have is no difference where another one has set nothing.
    """
    flat = [publishable(record.config.model_dump(mode="json")) for record in records]
    names = dict.fromkeys(name for one in flat for name in one)
    kept = [name for name in names if name == "run.seed" or not name.startswith(_NOT_COMPARED)]
    values = {name: [one.get(name, _NONE) for one in flat] for name in kept}
    return {name: own for name, own in values.items() if len({_NONE if one in _UNSET else one for one in own}) > 1}


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(
            Text(escape_control(head, keep="\n")), justify="left" if number == 0 else "right", overflow="fold"
        )
    return table
