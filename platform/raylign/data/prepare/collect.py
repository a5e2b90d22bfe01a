"""The first pass: every source is read once, its pairs go to disk and their keys into memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow.parquet as pq

from raylign.config.prepare import PrepareConfig
from raylign.data.examples import SCORES, STRENGTHS, Example
from raylign.data.prepare.accounts import Account, Filters, PairText, language_of
from raylign.data.prepare.duplicates import Keys, SignatureFile, key_of, signatures
from raylign.data.prepare.ratings import Pair, Rater
from raylign.data.prepare.table import SCHEMA, PairRow, record_batch, text_of, unknown_key, used_keys
from raylign.prompts.tables import Fault

BATCH = 2048
"""Pairs that are in memory as Python objects; the result does not depend on it."""


@dataclass(slots=True)
class Collected:
    """The pairs that passed the filters: `keys` in memory, the rest in files of the same order."""

    folder: Path
    keys: Keys
    signatures: SignatureFile | None
    message_keys: frozenset[str] = frozenset({"role", "content"})

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.parquet"


class Collector:
    """Takes Examples one by one. Use as a context; `collected` is complete when it has ended."""

    def __init__(self, config: PrepareConfig, folder: Path) -> None:
        self._config, self._filters = config, Filters(config.filters)
        near = config.filters.near_duplicates
        self._shingle = near.shingle if near is not None else 0
        file = SignatureFile(folder / "signatures") if near is not None else None
        self.collected = Collected(folder, Keys(), file)
        self._writer = pq.ParquetWriter(self.collected.pairs, SCHEMA, compression="lz4")
        self._rows: list[PairRow] = []
        self._texts: list[str] = []
        self._examples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()
            if self.collected.signatures is not None:
                self.collected.signatures.close()

    def add(self, example: Example, source: int, account: Account, rater: Rater) -> Fault | None:
        """Account for one row; a Fault where the prepared file cannot hold what it says."""
        answers = [message for completion in example.completions for message in completion.messages]
        if (key := unknown_key([*example.prompt, *answers])) is not None:
            cure = "remove that key, or make name, tool_call_id or reasoning_content a string"
            return Fault(example.number, f"a message has {key!r}, which the prepared file cannot hold", key, cure)
        made = rater.pairs(example)
        if isinstance(made, str):
            account.rows[made] += 1
            return None
        account.rows["paired"] += 1
        self._examples += 1
        for index, pair in enumerate(made):
            self._add_pair(example, index, pair, source, account)
        return None

    def _add_pair(self, example: Example, index: int, pair: Pair, source: int, account: Account) -> None:
        text = PairText(text_of(example.prompt), text_of(pair.chosen), text_of(pair.rejected))
        problem = self._filters.problem(text)
        if problem is not None:
            account.pairs[problem] += 1
            return
        language = example.language or language_of(text)
        self.collected.keys.add(key_of(example, pair), self._examples, language, source, text, pair)
        self.collected.message_keys |= used_keys([*example.prompt, *pair.chosen, *pair.rejected])
        row = PairRow(
            f"{source}-{example.number}-{index}",
            example.prompt,
            pair.chosen,
            pair.rejected,
            pair.score_chosen,
            pair.score_rejected,
            # Of two sources' own scores or strengths nobody knows how they compare.
            f"{pair.scale} of {account.name}" if pair.scale in (SCORES, STRENGTHS) else pair.scale,
            language,
            account.name,
            example.tools,
        )
        self._rows.append(row)
        self._texts.append(f"{text.prompt}\n{text.chosen}")
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        self._writer.write_batch(record_batch(self._rows))
        if self.collected.signatures is not None:
            self.collected.signatures.add(signatures(self._texts, self._shingle))
        self._rows, self._texts = [], []
