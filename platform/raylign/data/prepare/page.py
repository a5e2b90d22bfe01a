"""report.md: the numbers of a preparation as a page to read, with histograms."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raylign.data.prepare.accounts import MEANINGS, PairFate, RowFate
from raylign.data.prepare.duplicates import Keys
from raylign.data.prepare.report import QUANTILES, Quantiles, Report
from raylign.report.text import escape_control

Fate = TypeVar("Fate", RowFate, PairFate)


def page(report: Report, pictures: Sequence[str]) -> str:
    """The whole page in Markdown; `pictures` are files beside it."""
    kept, seen = report.pairs["kept"], sum(report.pairs.values())
    parts = [
        "# Prepared preferences",
        f"{kept:,} of {seen:,} pairs from {sum(report.rows.values()):,} rows are in `{report.file}` "
        f"({report.size:,} bytes, sha256 `{report.sha256}`).",
        speed_line(report),
        *[f"**Note:** {_cell(note)}" for note in report.notes],
        "## Rows",
        _table(("fate", "rows", "meaning"), _fates(report.rows)),
        "## Pairs",
        _table(("fate", "pairs", "meaning"), _fates(report.pairs)),
        "## Sources",
        _table(("source", "format", "rows", "pairs", "kept", "share %"), _sources(report)),
        "## Languages",
        _table(
            ("language", "pairs", "share %"),
            ((name, f"{count:,}", f"{100 * count / kept:.1f}") for name, count in report.languages.items()),
        ),
        "## Lengths in characters",
        _quantile_table("text", report.lengths, 0),
        "## Score of chosen less score of rejected",
        _quantile_table("source", {source.name: source.gaps for source in report.sources if source.gaps}, 3),
        *[f"![{name}]({name})" for name in pictures],
        "## Config",
        f"```yaml\n{yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(parts) + "\n"


def speed_line(report: Report) -> str:
    """Time, speed and memory."""
    memory = report.peak_rss_bytes / 2**20
    return f"{report.seconds:.1f} s, {report.rows_per_s:,.0f} rows/s, peak memory {memory:,.0f} MiB"


def _fates(counts: Mapping[Fate, int]) -> Iterable[tuple[str, ...]]:
    yield from ((fate, f"{count:,}", MEANINGS[fate]) for fate, count in counts.items())
    yield "all", f"{sum(counts.values()):,}", ""


def _sources(report: Report) -> Iterable[tuple[str, ...]]:
    for source in report.sources:
        kept, counts = source.pairs["kept"], (sum(source.rows.values()), sum(source.pairs.values()))
        cells = (f"{count:,}" for count in (*counts, kept))
        yield source.name, source.format, *cells, f"{100 * kept / report.pairs['kept']:.1f}"


def _quantile_table(what: str, rows: Mapping[str, Quantiles], decimals: int) -> str:
    if not rows:
        return "No scores."
    cells = ((name, *(f"{values[key]:,.{decimals}f}" for key in QUANTILES)) for name, values in rows.items())
    return _table((what, *QUANTILES), cells)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = ("source", "fate", "meaning", "format", "language", "text")
    lines = [headers, ["---" if header in text else "---:" for header in headers], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Names of files and hub data sets are text of others: no markup of theirs gets into the page."""
    safe = escape_control(text).replace("\\", "\\\\").replace("|", "\\|")
    return safe.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")


SCORES_NAME = "scores.png"
LENGTHS_NAME = "lengths.png"
BINS = 50
SHOWN_NAME = 60


def lengths_picture(keys: Keys, kept: NDArray[np.bool_], path: Path) -> None:
    """Characters of prompts and answers on a logarithmic axis."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    columns = {"prompt": keys.prompt_chars, "chosen": keys.chosen_chars, "rejected": keys.rejected_chars}
    values = {name: np.maximum(column.view()[kept], 1) for name, column in columns.items()}
    every = np.concatenate(list(values.values()))
    bins = np.geomspace(every.min(), every.max() + 1, BINS).tolist()
    for name, lengths in values.items():
        axes.hist(lengths, bins=bins, histtype="step", label=name)
    axes.set(xscale="log", xlabel="characters", ylabel="pairs", title="Lengths of kept pairs")
    axes.legend()
    _save(figure, path)


def scores_picture(keys: Keys, kept: NDArray[np.bool_], names: Sequence[str], path: Path) -> bool:
    """For each source with scores: both scores, and their difference. Without any no file is made; says which."""
    chosen, rejected = keys.score_chosen.view(), keys.score_rejected.view()
    scored = kept & ~np.isnan(chosen) & ~np.isnan(rejected)
    sources = [number for number in range(len(names)) if (scored & (keys.source.view() == number)).any()]
    if not sources:
        return False
    figure = Figure(figsize=(10, 3 * len(sources)), layout="constrained")
    for axes, number in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
        rows = scored & (keys.source.view() == number)
        both = (chosen[rows], rejected[rows])
        axes[0].hist(both, bins=BINS, histtype="step", label=("chosen", "rejected"))
        axes[0].set(title=_shown(names[number]), xlabel="score", ylabel="pairs")
        axes[0].legend()
        axes[1].hist(both[0] - both[1], bins=BINS)
        axes[1].set(title="chosen less rejected", xlabel="score", ylabel="pairs")
    _save(figure, path)
    return True


def _shown(name: str) -> str:
    """The end of a long name; a dollar sign would begin a formula."""
    short = name if len(name) <= SHOWN_NAME else f"...{name[-SHOWN_NAME:]}"
    return short.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
