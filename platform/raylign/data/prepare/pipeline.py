"""Rows that cannot be used, written to quarantine.jsonl as they come; few of them stay in memory."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console

from raylign.config.prepare import PrepareConfig
from raylign.data.formats import SCALES
from raylign.data.prepare.accounts import Account
from raylign.data.prepare.collect import Collected, Collector
from raylign.data.prepare.decide import Decision, decide
from raylign.data.prepare.duplicates import Keys
from raylign.data.prepare.page import (
    LENGTHS_NAME,
    PAIRS_NAME,
    SCORES_NAME,
    Report,
    lengths_picture,
    make_report,
    page,
    scores_picture,
    write_json,
)
from raylign.data.prepare.ratings import Rater
from raylign.data.prepare.table import copy_rows
from raylign.data.rows import ExampleStream, read_examples
from raylign.errors import ConfigError, DataError
from raylign.prompts.quarantine import QUARANTINE_NAME, InvalidRows, quarantine_line, refusal
from raylign.prompts.tables import Fault
from raylign.report.console import stage_progress
from raylign.run.files import disk_errors, publish_folder

HELD = 100
"""Bad rows of a source that are kept for the message when there are too many."""


class BadRows:
    """Takes the faults of all sources, one source after another. Use as a context, then `settle`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("w", encoding="utf-8")
        self._sources: list[InvalidRows] = []
        self._held: list[Fault] = []
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, source: ExampleStream, fault: Fault) -> None:
        self._stream.write(quarantine_line(source.where, source.unit, fault))
        self._count += 1
        if len(self._held) < HELD:
            self._held.append(fault)

    def finish_source(self, source: ExampleStream, total: int) -> None:
        """Close the account of a source of `total` rows."""
        more = self._count - len(self._held)
        self._sources.append(InvalidRows(source.where, source.unit, tuple(self._held), total, more))
        self._held, self._count = [], 0

    def settle(self, limit: float, refused_to: Path) -> None:
        """Without bad rows no file stays.

        Raises one DataError when more than `limit` (0 to 1) of a source's rows is bad; all are then in `refused_to`.
        """
        if lines := refusal(self._sources, limit, "max_invalid"):
            self._path.replace(refused_to)
            raise DataError("\n".join([*lines, f"every bad row is in {refused_to}"]))
        if not any(source.count for source in self._sources):
            self._path.unlink()


ADVANCE = 100
"""Rows between two looks at the progress."""


def prepare(config: PrepareConfig, console: Console) -> Report:
    """Make `config.output`, whole or not at all, with the pairs, the report and the rows that were set aside.

    The file of pairs depends on the config and the sources alone, and has the pairs in the sources' order. Raises
    ConfigError when the folder exists, DataError when a source cannot be read, has too many bad rows or nothing of what
    the mix wants, DiskError when the disk is full or cannot be written.
    """
    started, output = time.monotonic(), config.output.expanduser().absolute()
    if os.path.lexists(output):
        raise ConfigError(f"{output} exists; set output to another folder, or remove it")
    streams = [read_examples(source) for source in config.sources]
    with disk_errors(output, "output"), _staging(output) as staging:
        work = staging / "work"
        work.mkdir()
        accounts, collected = _collect(config, streams, staging, console)
        decision = decide(collected, config, accounts)
        _write(collected, decision, staging / PAIRS_NAME, console)
        shutil.rmtree(work)
        report = make_report(config, accounts, collected.keys, decision, staging / PAIRS_NAME, started)
        _describe(report, collected.keys, decision, staging)
        publish_folder(staging, output)
    return report


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is gone afterwards, unless it was renamed."""
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def _collect(
    config: PrepareConfig, streams: Sequence[ExampleStream], staging: Path, console: Console
) -> tuple[list[Account], Collected]:
    accounts = []
    with BadRows(staging / QUARANTINE_NAME) as bad, Collector(config, staging / "work") as collector:
        for source, (block, stream) in enumerate(zip(config.sources, streams, strict=True)):
            account = Account(block.name, stream.where, stream.format)
            rater = Rater(config.ratings, SCALES[stream.format])
            _read(stream, source, account, collector, rater, bad, console)
            bad.finish_source(stream, account.rows.total())
            accounts.append(account)
    bad.settle(config.max_invalid, staging.with_name(f"{config.output.name}.{QUARANTINE_NAME}"))
    return accounts, collector.collected


def _read(
    stream: ExampleStream,
    source: int,
    account: Account,
    collector: Collector,
    rater: Rater,
    bad: BadRows,
    console: Console,
) -> None:
    with stage_progress(console, f"read {account.name}", stream.total, "rows") as advance:
        count = 0
        for count, item in enumerate(stream, start=1):
            fault = item if isinstance(item, Fault) else collector.add(item, source, account, rater)
            if fault is not None:
                bad.add(stream, fault)
                account.rows["bad"] += 1
            if count % ADVANCE == 0:
                advance(ADVANCE)
        advance(count % ADVANCE)


def _write(collected: Collected, decision: Decision, path: Path, console: Console) -> None:
    with stage_progress(console, "write", len(collected.keys), "pairs") as advance:
        for count in copy_rows(collected.pairs, path, decision.kept, collected.message_keys):
            advance(count)


def _describe(report: Report, keys: Keys, decision: Decision, folder: Path) -> None:
    """The report for programs and for people, and its pictures."""
    pictures = [LENGTHS_NAME]
    lengths_picture(keys, decision.kept, folder / LENGTHS_NAME)
    if scores_picture(keys, decision.kept, [source.name for source in report.sources], folder / SCORES_NAME):
        pictures.append(SCORES_NAME)
    write_json(report, folder / "report.json")
    (folder / "report.md").write_text(page(report, pictures), encoding="utf-8")
