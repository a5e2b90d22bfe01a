"""How the trainer's speed and memory go with sequence length, candidates, width and vocabulary."""

from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from rich.table import Table

from raylign.report.tables import report_console
from tests.benchmarks.harness.children import Stage, measured
from tests.benchmarks.harness.report import Check, cores, finish, machine, results_folder, table
from tests.benchmarks.harness.scaling import Point, ScalingJob, ScalingResult, Series, Shape

MAX_COST_GROWTH = 1.15
"""A timing of a second or two varies by several percent."""
MAX_LOGITS_SHARE = 0.5
MAX_GROUP_GROWTH = 1.25
"""A heap's peak creeps up with every piece; one pass over 64 completions keeps over ten times as much."""
MIB = 2**20

TOKENS = 8192
"""Counted tokens of a step in the series over length."""
SEQUENCES = 16
"""Candidates of a step in the series over K."""
COMPLETION = 256
"""Tokens of a completion in the series over vocabulary."""


def main(
    max_length: Annotated[int, typer.Option(help="Longest sequence.")] = 4096,
    max_candidates: Annotated[int, typer.Option(help="Largest K, at most 16.")] = 16,
    max_group: Annotated[int, typer.Option(help="Largest K of a group that is run in pieces, at most 64.")] = 64,
    max_width: Annotated[int, typer.Option(help="Widest model.")] = 512,
    max_vocabulary: Annotated[int, typer.Option(help="Largest vocabulary.")] = 262144,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each shape; the fastest counts.")] = 3,
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one a core.")] = 0,
) -> None:
    """Measure raylign's trainer on random Llamas; needs about four minutes on two cores."""
    folder = results_folder("scaling")
    stage = Stage(report_console(), folder, threads or cores())
    facts = machine(stage)
    series = (
        _over_length([n for n in (128, 256, 512, 1024, 2048, 4096) if n <= max_length]),
        *[_over_candidates(packing, max_candidates) for packing in ("shared", "packed")],
        _over_groups(max_group),
        *[_of_width(width) for width in (128, 256, 512) if width <= max_width],
        *[_of_vocabulary(size) for size in (8192, 32768, 131072, 262144) if size <= max_vocabulary],
    )
    job = ScalingJob(series=series, repeats=repeats, threads=stage.threads)
    with measured("scaling"):
        points = stage.run("scaling", "scaling_trainer", job, ScalingResult).result.points
    record = {"machine": facts, "job": job.model_dump(), "points": [point.model_dump() for point in points]}
    finish(stage.console, folder, [_table(points)], _checks(job, points), record)


def _over_length(lengths: Sequence[int]) -> Series:
    """Equal counted tokens a step."""
    shapes = {
        str(length): Shape(preferences=TOKENS // (2 * length), candidates=2, prompt=length // 2, completion=length // 2)
        for length in lengths
    }
    return Series(name="length", axis="tokens", shapes=shapes)


def _over_candidates(packing: Literal["shared", "packed"], most: int) -> Series:
    """Equal sequences a step, completions of 64 tokens to prompts of 512; large K shares most, so it comes first."""
    shapes = {
        str(k): Shape(preferences=SEQUENCES // k, candidates=k, prompt=512, completion=64)
        for k in (16, 8, 4, 2)
        if k <= most
    }
    return Series(name=f"K-{packing}", axis="K", packing=packing, shapes=shapes)


def _over_groups(most: int) -> Series:
    """One group a step, in pieces of one completion of 128 tokens behind its prompt of 256."""
    shapes = {
        str(k): Shape(preferences=1, candidates=k, prompt=256, completion=128) for k in (2, 8, 32, 64) if k <= most
    }
    return Series(name="K-pieces", axis="K", max_tokens=384, shapes=shapes)


def _of_width(width: int) -> Series:
    shapes = {str(width): Shape(preferences=4, candidates=2, prompt=256, completion=256)}
    return Series(name=f"width-{width}", axis="width", width=width, shapes=shapes)


def _of_vocabulary(size: int) -> Series:
    shapes = {str(size): Shape(preferences=2, candidates=2, prompt=64, completion=COMPLETION)}
    return Series(name=f"vocabulary-{size}", axis="vocabulary", width=128, layers=2, vocabulary=size, shapes=shapes)


_KINDS = {"K-packed": " packed", "K-pieces": " in pieces"}


def _table(points: Sequence[Point]) -> Table:
    rows = [
        [
            f"{point.series.split('-')[0]} {point.at}{_KINDS.get(point.series, '')}",
            point.counted / point.seconds,
            1e6 * point.seconds / point.counted,
            point.gflops,
            point.own_bytes / MIB,
            point.activation_bytes / MIB,
            point.activation_bytes / point.counted / 1024,
        ]
        for point in points
    ]
    headers = [
        "shape",
        "tokens/s",
        "us a token",
        "GFLOP/s",
        "model and libraries\nMiB",
        "activations\nMiB",
        "KiB a token",
    ]
    return table(
        "steps of raylign's trainer, reference pass included; tokens count every prompt K times", headers, rows
    )


def _checks(job: ScalingJob, points: Sequence[Point]) -> list[Check]:
    return [*_cost_checks(points), _group_check(points), _vocabulary_check(job, points)]


def _group_check(points: Sequence[Point]) -> Check:
    """Activations of a group in pieces at the largest K over those at the smallest."""
    found = {int(point.at): point.activation_bytes for point in points if point.series == "K-pieces"}
    what = f"activations of a group of {max(found)} in pieces, times those of {min(found)}"
    return Check(what, found[max(found)] / found[min(found)], "at most", MAX_GROUP_GROWTH)


def _cost_checks(points: Sequence[Point]) -> list[Check]:
    """Cost of a token at the largest K over that at the smallest."""
    checks = []
    for packing in ("shared", "packed"):
        costs = {int(p.at): p.seconds / p.counted for p in points if p.series == f"K-{packing}"}
        growth = costs[max(costs)] / costs[min(costs)]
        what = f"cost of a token at K={max(costs)}, times that at K={min(costs)}, {packing}"
        checks.append(Check(what, growth, "at most", MAX_COST_GROWTH))
    return checks


def _vocabulary_check(job: ScalingJob, points: Sequence[Point]) -> Check:
    """Activations at the largest vocabulary above those at the smallest, as a share of one fp32 [N, V] tensor."""
    found = {int(point.at): point.activation_bytes for point in points if point.axis == "vocabulary"}
    shape = next(iter(job.series[-1].shapes.values()))
    logits = 4 * max(found) * shape.preferences * shape.candidates * shape.completion
    share = (found[max(found)] - found[min(found)]) / logits
    what = f"activations at {max(found)} tokens of vocabulary above those at {min(found)}, as a share of fp32 logits"
    return Check(what, share, "at most", MAX_LOGITS_SHARE)


if __name__ == "__main__":
    typer.run(main)
