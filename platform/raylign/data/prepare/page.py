"""The report of a preparation: report.json, and report.md as a page to read, with histograms."""

import json
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raylign.config.prepare import PrepareConfig
from raylign.data.prepare.accounts import MEANINGS, Account, PairFate, RowFate, total_fates
from raylign.data.prepare.decide import Decision
from raylign.data.prepare.duplicates import Keys
from raylign.report.text import escape_control
from raylign.run.fingerprints import fingerprint

PAIRS_NAME = "preferences.parquet"
QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
Quantiles = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Fates of the rows and the pairs of one source. `gaps` are quantiles of kept pairs, empty without scores."""

    name: str
    where: str
    format: str
    rows: Mapping[RowFate, int]
    pairs: Mapping[PairFate, int]
    gaps: Quantiles


@dataclass(frozen=True, slots=True)
class Report:
    """Made by `prepare`, written as report.json.

    `rows` and `pairs` count each row and each pair once, by fate. `languages` are the kept pairs of each; `lengths`
    are quantiles in characters of kept pairs. `rows_per_s` is over the whole time; `peak_rss_bytes` is the process's.
    """

    sources: tuple[SourceReport, ...]
    rows: Mapping[RowFate, int]
    pairs: Mapping[PairFate, int]
    languages: Mapping[str, int]
    lengths: Mapping[str, Quantiles]
    notes: tuple[str, ...]
    file: str
    size: int
    sha256: str
    seconds: float
    rows_per_s: float
    peak_rss_bytes: int
    config: Mapping[str, Any]


def make_report(
    config: PrepareConfig, accounts: Sequence[Account], keys: Keys, decision: Decision, pairs: Path, started: float
) -> Report:
    """Count and measure. `started` is when the work began, by time.monotonic()."""
    kept, seconds = decision.kept, time.monotonic() - started
    rows, fates = total_fates(accounts)
    mark = fingerprint(pairs)
    gaps = keys.score_chosen.view() - keys.score_rejected.view()
    texts = {"prompt": keys.prompt_chars, "chosen": keys.chosen_chars, "rejected": keys.rejected_chars}
    return Report(
        tuple(
            _source_report(account, gaps[kept & (keys.source.view() == number)])
            for number, account in enumerate(accounts)
        ),
        rows,
        fates,
        _languages(keys, kept),
        {name: quantiles(column.view()[kept]) for name, column in texts.items()},
        decision.notes,
        pairs.name,
        mark.size,
        mark.sha256,
        seconds,
        sum(rows.values()) / seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        config.model_dump(mode="json"),
    )


def write_json(report: Report, path: Path) -> None:
    path.write_text(f"{json.dumps(asdict(report), indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def quantiles(values: NDArray[Any]) -> Quantiles:
    """Of the values that are numbers; empty where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {}
    found = np.quantile(known, list(QUANTILES.values()))
    return {name: round(float(value), 4) for name, value in zip(QUANTILES, found, strict=True)}


def _source_report(account: Account, gaps: NDArray[np.float32]) -> SourceReport:
    rows, pairs = total_fates([account])
    return SourceReport(account.name, account.where, account.format, rows, pairs, quantiles(gaps))


def _languages(keys: Keys, kept: NDArray[np.bool_]) -> dict[str, int]:
    """Most frequent first."""
    counts = np.bincount(keys.language.view()[kept], minlength=len(keys.languages))
    found = {name: int(count) for name, count in zip(keys.languages, counts, strict=True) if count}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


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
