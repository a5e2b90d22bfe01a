"""What the record costs training: the same loop with its journal fed to no, a healthy, a killed and a slow MLflow."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Annotated

import typer
from rich.table import Table

from raylign.report.tables import report_console
from tests.benchmarks.harness.children import Stage, measured
from tests.benchmarks.harness.report import Check, finish, machine, results_folder, table
from tests.benchmarks.harness.tracking import Server, TrackedBlock, TrackingJob, TrackingResult

MAX_SLOWDOWN_PERCENT = 1.0
WINDOW_S = 2.0
"""Steps are added up over windows as long as the feed's pause, so that each has its share of what the feed does."""

Blocks = dict[Server, list[TrackedBlock]]


def main(
    repeats: Annotated[int, typer.Option(min=2, help="Blocks of steps in each condition, taken in turn.")] = 8,
    steps: Annotated[int, typer.Option(min=12, help="Optimizer steps of a block, each with a journal event.")] = 24,
    step_s: Annotated[float, typer.Option(min=0.05, help="Seconds of a step, about.")] = 0.25,
    delay_s: Annotated[float, typer.Option(help="What the slow server holds every answer back for.")] = 2.0,
) -> None:
    """Measure on one thread; needs about seven minutes on two cores."""
    folder = results_folder("tracking_overhead")
    stage = Stage(report_console(), folder, threads=1)
    facts = machine(stage)
    job = TrackingJob(repeats=repeats, steps=steps, step_s=step_s, delay_s=delay_s)
    with measured("tracking_overhead"):
        blocks = stage.run("tracking", "tracking_loop", job, TrackingResult).result.blocks
    by_server = {server: [block for block in blocks if block.server is server] for server in Server}
    record = {"machine": facts, "job": job.model_dump(), "blocks": [block.model_dump() for block in blocks]}
    finish(stage.console, folder, [_table(by_server)], _checks(by_server), record)


def _table(blocks: Blocks) -> Table:
    rows = []
    for server, own in blocks.items():
        slower = sorted(_slowdowns(blocks, server))
        measured_s = [f"{median(slower):+.2f}", f"{slower[0]:+.1f} to {slower[-1]:+.1f}"]
        appends = [1000 * seconds for block in own for seconds in block.appends_s]
        shares = [_blocked_percent(own), _feed_percent(own)]
        cells = [_step_s(own), *(["-", "-"] if server is Server.NONE else measured_s), *shares]
        rows.append(
            [
                str(server),
                *cells,
                median(appends),
                max(appends),
                str(own[-1].events),
                str(own[-1].missing),
                str(sum(block.traces for block in own)),
            ]
        )
    headers = [
        "journal fed to",
        "step\ns",
        "slower by\n%",
        "repeats\n%",
        "thread blocked\n%",
        "CPU of the feed\n%",
        "append\nms",
        "longest append\nms",
        "events",
        "not yet\nin MLflow",
        "traces sent\nmeanwhile",
    ]
    return table("optimizer steps on one thread, each with a journal event; waits for a core left out", headers, rows)


def _checks(blocks: Blocks) -> list[Check]:
    journal = [*blocks[Server.NONE], *blocks[Server.AGAIN]]
    own = _blocked_percent(journal) + _feed_percent(journal)
    return [
        Check(
            f"step time lost to the feed beside the journal's own {own:.2f} %, {server}",
            _blocked_percent(blocks[server]) + _feed_percent(blocks[server]) - own,
            "at most",
            MAX_SLOWDOWN_PERCENT,
            " %",
        )
        for server in (Server.HEALTHY, Server.KILLED, Server.SLOW)
    ]


def _seconds(block: TrackedBlock) -> list[float]:
    """Of every step, waits for a core left out."""
    return [wall - waited for wall, waited in zip(block.steps_s, block.waits_s, strict=True)]


def _step_s(blocks: Sequence[TrackedBlock]) -> float:
    return median(seconds for block in blocks for seconds in _seconds(block))


def _blocked_percent(blocks: Sequence[TrackedBlock]) -> float:
    """Time in which the training thread neither computed nor waited for a core: it waited for a disk or a lock."""
    idle = sum(seconds - cpu for block in blocks for seconds, cpu in zip(_seconds(block), block.cpu_s, strict=True))
    return 100 * idle / _total_s(blocks)


def _feed_percent(blocks: Sequence[TrackedBlock]) -> float:
    """CPU time of other threads: they slow training by no more than that, were they on its core."""
    return 100 * sum(block.feed_cpu_s for block in blocks) / _total_s(blocks)


def _total_s(blocks: Sequence[TrackedBlock]) -> float:
    return sum(sum(_seconds(block)) for block in blocks)


def _slowdowns(blocks: Blocks, server: Server) -> list[float]:
    """Percent by which `server`'s block of each repeat is slower than the mean of the two with the journal alone.

    The second of these is compared with the first: what it differs by is chance.
    """
    first, again = blocks[Server.NONE], blocks[Server.AGAIN]
    if server in (Server.NONE, Server.AGAIN):
        bases = [_typical_s(one) for one in first]
    else:
        bases = [fmean((_typical_s(one), _typical_s(other))) for one, other in zip(first, again, strict=True)]
    return [100 * (_typical_s(block) / base - 1) for block, base in zip(blocks[server], bases, strict=True)]


def _typical_s(block: TrackedBlock) -> float:
    """The median over windows of their seconds a step, waits for a core left out."""
    seconds = _seconds(block)
    size = max(1, round(WINDOW_S / median(block.steps_s)))
    whole = range(0, max(1, len(seconds) - size + 1), size)
    return median(fmean(seconds[start : start + size]) for start in whole)


if __name__ == "__main__":
    typer.run(main)
