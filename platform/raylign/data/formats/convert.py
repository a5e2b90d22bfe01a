"""From the rows of one format to Examples."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raylign.config.data import Format
from raylign.data.examples import Example
from raylign.data.formats.detect import FORMATS
from raylign.data.formats.parts import BadRow, Cells
from raylign.prompts.tables import Fault, Row, is_json_scalar

SCALES: Mapping[Format, Mapping[str, tuple[float, float]]] = {name: form.scales for name, form in FORMATS.items()}
"""Lowest and highest value of each attribute in `Completion.ratings`, by format."""
LANGUAGE_COLUMNS = ("language", "lang")
LANGUAGE = re.compile(r"[a-z]{2,3}")
LONGEST_META = 256
"""A longer text (in characters) is content, not a label of its row."""


def examples(rows: Iterable[Row | Fault], kind: Format, language: str | None) -> Iterator[Example | Fault]:
    """What the rows of a format hold, in their order; `language` overrides what the rows say.

    Adjacent rows with a rated answer each to the same prompt are one Example, with the number of the first.
    """
    waiting: Example | None = None
    for row in rows:
        made, joins = (row, False) if isinstance(row, Fault) else _made(row, kind, language)
        if waiting is not None and joins and isinstance(made, Example) and waiting.prompt == made.prompt:
            waiting = replace(waiting, completions=(*waiting.completions, *made.completions))
            continue
        if waiting is not None:
            yield waiting
        if joins and isinstance(made, Example):
            waiting = made
        else:
            waiting = None
            yield made
    if waiting is not None:
        yield waiting


def _made(row: Row, kind: Format, language: str | None) -> tuple[Example | Fault, bool]:
    """The Example of a row, and whether it waits for adjacent rows."""
    try:
        parts = FORMATS[kind].parse(row.cells)
    except BadRow as bad:
        return Fault(row.number, bad.problem, bad.value, bad.cure), False
    example = Example(
        row.number,
        parts.prompt,
        parts.completions,
        parts.ranked,
        parts.tools,
        language or _language(row.cells) or parts.language,
        _meta(row.cells, parts.used),
        parts.scale,
    )
    return example, parts.joins


def _language(cells: Cells) -> str | None:
    """The row's own language, where it is a code."""
    for column in LANGUAGE_COLUMNS:
        value = cells.get(column)
        if isinstance(value, str) and LANGUAGE.fullmatch(value):
            return value
    return None


def _meta(cells: Cells, used: frozenset[str]) -> dict[str, Any]:
    return {
        name: value
        for name, value in cells.items()
        if name not in used and is_json_scalar(value) and not (isinstance(value, str) and len(value) > LONGEST_META)
    }
