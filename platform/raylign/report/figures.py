"""The figures of a run, drawn from its record alone: PNG, which MLflow shows and pages hold."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylign.records import Evaluation
from raylign.report.measures import Measure, measured, shown
from raylign.report.record import RunRecord
from raylign.report.tables import EVEN, step_mean
from raylign.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _DPI = 6.4, 3.6, 100
_NARROW = 5.4
"""Inches of what stands in MLflow's description, whose text is as wide as its picture, however narrow the window is."""
_LONGEST = 44
"""Characters of a name beside a bar."""
_MARGINS = "rewards/margins"
_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d9730d", "#777777"


@dataclass(frozen=True, slots=True)
class Picture:
    """`name` is the file's; `title` says what one sees."""

    name: str
    title: str
    png: bytes


def pictures(record: RunRecord) -> tuple[Picture, ...]:
    """Those that the record has something for, in the order to read them. Takes seconds: matplotlib is loaded here."""
    drawings: Mapping[str, tuple[str, Callable[[RunRecord], Figure | None]]] = {
        "win_rates": ("Win rates with their intervals", _win_rates),
        "score": ("Held-out quality by round, with its interval", _quality),
        "frontier": ("Score by KL: what each nat has bought", _frontier),
        "margins": ("Reward margins in training and held out", _margins),
        "yield": ("From candidates to preferences, all rounds", _yield),
        "seconds": ("Wall time of a round by stage", _seconds),
        "staleness": ("Candidates by how many versions old their sampler was", _staleness),
    }
    drawn = ((name, title, draw(record)) for name, (title, draw) in drawings.items())
    return tuple(Picture(name, title, _png(figure)) for name, title, figure in drawn if figure is not None)


def _figure(panels: int = 1, width: float = _WIDTH) -> "tuple[Figure, list[Axes]]":
    """With so many panels, two beside each other at most."""
    # Takes a second to load, also for commands that draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns, rows = min(2, panels), math.ceil(panels / 2)
    figure = Figure(figsize=(width, _HEIGHT if rows == 1 else 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    del axes[panels:]
    for own in axes:
        own.spines[["top", "right"]].set_visible(False)
        own.grid(axis="y", color="#dddddd", linewidth=0.6)
        own.set_axisbelow(True)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _by_round(axes: "Axes", rounds: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(rounds) - 0.4, max(rounds) + 0.4)


def _win_rates(record: RunRecord) -> "Figure | None":
    """Of a comparison: each opponent, and each category of prompts below it."""
    if record.comparison is None:
        return None
    rows = [
        row
        for name, opponent in record.comparison.opponents.items()
        for row in [(f"over {name}", opponent.overall), *opponent.categories.items()]
    ]
    figure, (axes,) = _figure()
    figure.set_size_inches(_NARROW, max(1.6, 0.8 + 0.3 * len(rows)))
    whole = {f"over {name}" for name in record.comparison.opponents}
    for place, (name, won) in enumerate(rows):
        color = _BLUE if name in whole else _GREY
        axes.plot([won.low, won.high], [place, place], color=color, linewidth=1.4)
        axes.plot([won.rate], [place], marker="o", color=color)
    axes.axvline(EVEN, color=_GREY, linewidth=0.8, linestyle="--")
    names = [one_line(f"{name}, {won.prompts} prompts", _LONGEST) for name, won in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9, parse_math=False)
    axes.set(xlim=(-0.02, 1.02), xlabel="win rate")
    axes.invert_yaxis()
    axes.grid(visible=False)
    return figure


def _quality(record: RunRecord) -> "Figure | None":
    """Every measure with an interval has a panel."""
    if not record.evaluations or record.comparison is not None:
        return None
    rounds = [index for index, _ in record.evaluations]
    found = [measured(evaluation) for _, evaluation in record.evaluations]
    ranged = [measure for measure in shown([each for _, each in record.evaluations]) if measure.low]
    figure, panels = _figure(len(ranged), _NARROW)
    for axes, measure in zip(panels, ranged, strict=True):
        points = [
            (index, *span) for index, values in zip(rounds, found, strict=True) if (span := _span(values, measure))
        ]
        own, middle = [index for index, *_ in points], [value for _, value, _, _ in points]
        low, high = [low for _, _, low, _ in points], [high for *_, high in points]
        axes.fill_between(own, low, high, color=_BLUE, alpha=0.18, linewidth=0)
        axes.vlines(own, low, high, color=_BLUE, linewidth=1.4)
        axes.plot(own, middle, marker="o", color=_BLUE)
        if measure.name.startswith("win_rate"):
            axes.axhline(EVEN, color=_GREY, linewidth=0.8, linestyle="--")
        axes.set_title(measure.title + (" (lower is better)" if measure.falls else ""), fontsize=10)
        _by_round(axes, rounds)
    return figure


def _span(values: Mapping[str, float | None], measure: Measure) -> tuple[float, float, float] | None:
    """The value and its bounds, if all are there."""
    value, low, high = (values.get(name) for name in (measure.name, measure.low, measure.high))
    return None if value is None or low is None or high is None else (value, low, high)


def _frontier(record: RunRecord) -> "Figure | None":
    """By KL to the initial policy, to the reference where that is not known."""
    points = []
    for index, evaluation in record.evaluations:
        if isinstance(evaluation, Evaluation):
            kl = evaluation.kl if evaluation.kl_initial is None else evaluation.kl_initial
            points += [] if kl is None else [(index, kl, evaluation)]
    if len(points) < 2:
        return None
    figure, (axes,) = _figure()
    kls, scores = [kl for _, kl, _ in points], [each.score for *_, each in points]
    spans = [[each.score - each.score_low, each.score_high - each.score] for *_, each in points]
    axes.errorbar(kls, scores, yerr=list(zip(*spans, strict=True)), color=_BLUE, marker="o", elinewidth=1, alpha=0.9)
    for index, kl, each in points:
        axes.annotate(str(index), (kl, each.score), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="KL, nats a completion (points: rounds)", ylabel="held-out score")
    return figure


def _margins(record: RunRecord) -> "Figure | None":
    """Of every step and the mean of each round; held out where the evaluation has them."""
    steps = [
        (report.index - 1 + number / len(report.steps), step[_MARGINS])
        for report in record.reports
        for number, step in enumerate(report.steps, 1)
        if _MARGINS in step
    ]
    if not steps:
        return None
    figure, (axes,) = _figure()
    axes.plot(*zip(*steps, strict=True), color=_BLUE, alpha=0.35, linewidth=1, label="training, each step")
    means = [(report.index, mean) for report in record.reports if (mean := step_mean(report, _MARGINS)) is not None]
    axes.plot(*zip(*means, strict=True), color=_BLUE, marker="o", label="training, mean of the round")
    held = [(index, value) for index, each in record.evaluations if (value := measured(each).get(_MARGINS)) is not None]
    if held:
        axes.plot(*zip(*held, strict=True), color=_ORANGE, marker="s", label="held out")
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_ylabel(_MARGINS)
    axes.legend(fontsize=8, frameon=False)
    _by_round(axes, [0, *(report.index for report in record.reports)])
    return figure


def _yield(record: RunRecord) -> "Figure | None":
    """Candidates, then prompts, each with what was lost on the way; preferences last."""
    total: dict[str, int] = {}
    for report in record.reports:
        for name, count in report.counts.items():
            total[name] = total.get(name, 0) + count
    if "candidates" not in total:
        return None
    first = ("candidates", "unscored", "truncated", "prompts")
    lost = [name for name, count in total.items() if count and name not in (*first, "preferences")]
    names = [name for name in first if total.get(name)] + lost + ["preferences"]
    kept = {"candidates", "prompts", "preferences"}
    figure, (axes,) = _figure()
    bars = axes.barh(
        ["of them truncated" if name == "truncated" else name.replace("_", " ") for name in names],
        [total.get(name, 0) for name in names],
        color=[_BLUE if name in kept else _GREY if name == "truncated" else _ORANGE for name in names],
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False)
    if lost or total.get("unscored"):
        axes.set_xlabel("orange: left out")
    return figure


def _seconds(record: RunRecord) -> "Figure | None":
    stages = list(dict.fromkeys(stage for report in record.reports for stage in report.seconds))
    return _stacked(record, {stage: [r.seconds.get(stage, 0.0) for r in record.reports] for stage in stages}, "seconds")


def _staleness(record: RunRecord) -> "Figure | None":
    """Only where some candidate is older than the newest policy."""
    lags = sorted({lag for found in record.lags.values() for lag in found})
    if not any(lags):
        return None
    shares = {
        f"{lag} versions old": [_share(record.lags.get(report.index, {}), lag) for report in record.reports]
        for lag in lags
    }
    return _stacked(record, shares, "share of candidates")


def _share(found: Mapping[int, int], lag: int) -> float:
    return found.get(lag, 0) / max(1, sum(found.values()))


def _stacked(record: RunRecord, parts: Mapping[str, Sequence[float]], unit: str) -> "Figure | None":
    """A bar for each round."""
    if not record.reports or not parts:
        return None
    rounds, bottom = [report.index for report in record.reports], [0.0] * len(record.reports)
    figure, (axes,) = _figure()
    for name, values in parts.items():
        axes.bar(rounds, values, bottom=bottom, width=0.7, label=name)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    axes.set_ylabel(unit)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _by_round(axes, rounds)
    return figure
