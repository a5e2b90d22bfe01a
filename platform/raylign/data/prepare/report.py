"""What a preparation did, in numbers: report.json, and the page and the pictures made from it."""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylign.config.prepare import PrepareConfig
from raylign.data.prepare.accounts import Account, PairFate, RowFate, total_fates
from raylign.data.prepare.decide import Decision
from raylign.data.prepare.duplicates import Keys
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
