"""report.md: the numbers of a preparation as a page to read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import yaml

from raylign.data.prepare.accounts import MEANINGS, PairFate, RowFate
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
