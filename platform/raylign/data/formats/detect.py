"""Which format a source has, told from its first rows, and its rows as Examples."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from raylign.config.data import Format
from raylign.data.examples import Example
from raylign.data.formats import alpaca, helpsteer2, hh, sharegpt, trl, ultrafeedback
from raylign.data.formats.parts import BadRow, Cells, Form
from raylign.errors import DataError
from raylign.prompts.tables import Fault, Row, is_json_scalar

FORMATS: Mapping[Format, Form] = {
    "trl": Form(trl.parse, trl.COLUMNS),
    "sharegpt": Form(sharegpt.parse, sharegpt.COLUMNS),
    "alpaca": Form(alpaca.parse, alpaca.COLUMNS),
    "hh": Form(hh.parse, hh.COLUMNS),
    "helpsteer2": Form(helpsteer2.parse, helpsteer2.COLUMNS, helpsteer2.SCALES),
    "ultrafeedback": Form(ultrafeedback.parse, ultrafeedback.COLUMNS, ultrafeedback.SCALES),
    "ultrafeedback_zh": Form(ultrafeedback.parse_chinese, ultrafeedback.COLUMNS, ultrafeedback.SCALES),
}


def resolve_format(wanted: Format, where: str, rows: Sequence[Cells], language: str | None) -> Format:
    """`wanted`, or for `auto` the one format that the first rows have.

    Raises DataError when no row has the columns of `wanted`, or when `auto` finds no format or several.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    if wanted != "auto":
        if any(_has_columns(wanted, row) for row in rows):
            return wanted
        raise DataError(
            f"{where}: no row has the columns of format {wanted} ({_columns(wanted)}), it has {_listed(columns)}; "
            "correct format, or rename the columns"
        )
    # Of the formats that fit some row, the one that fits most: a row of another kind is judged by itself later.
    counts = Counter(kind for row in rows for kind in _kinds(row, language))
    found = [kind for kind, count in counts.items() if count == max(counts.values())]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{name} ({_columns(name)})" for name in FORMATS)
    verdict = f"may be any of {', '.join(sorted(found))}" if found else "is none that is known"
    raise DataError(f"{where}: its format {verdict}: it has {_listed(columns)}; set format to one of {known}")


def _has_columns(kind: Format, row: Cells) -> bool:
    return any(all(row.get(column) is not None for column in shape) for shape in FORMATS[kind].columns)


def _kinds(row: Cells, language: str | None) -> set[Format]:
    """The formats that a row fits."""
    kinds: set[Format] = set()
    fits = {kind for kind in FORMATS if _has_columns(kind, row)}
    if _is_ultrafeedback(row):
        chinese = language == "zh" or (language is None and ultrafeedback.is_chinese(row["instruction"]))
        kinds.add("ultrafeedback_zh" if chinese else "ultrafeedback")
    if "alpaca" in fits:
        kinds.add("alpaca")
    if "helpsteer2" in fits:
        kinds.add("helpsteer2")
    if "hh" in fits and row.get("prompt") is None and hh.is_transcript(row["chosen"]):
        kinds.add("hh")
    if "sharegpt" in fits and _is_sharegpt(row):
        kinds.add("sharegpt")
    if "trl" in fits and not kinds & {"hh", "sharegpt"} and not _only_pair_of_alpaca(row, kinds):
        kinds.add("trl")
    return kinds


def _is_ultrafeedback(row: Cells) -> bool:
    return row.get("instruction") is not None and (
        row.get("completions") is not None or row.get("chosen_response") is not None
    )


def _is_sharegpt(row: Cells) -> bool:
    """`conversations` is this format's own; `messages` is TRL's too, which never has one message for an answer."""
    if row.get("conversations") is not None or isinstance(row.get("chosen"), dict):
        return True
    first: Any = row["messages"][0] if isinstance(row.get("messages"), list) and row["messages"] else None
    return isinstance(first, dict) and "from" in first


def _only_pair_of_alpaca(row: Cells, kinds: set[Format]) -> bool:
    """Chosen and rejected beside an instruction are whole answers, not TRL's texts with the prompt inside."""
    return "alpaca" in kinds and row.get("prompt") is None and row.get("messages") is None


def _columns(kind: Format) -> str:
    return " or ".join(", ".join(shape) for shape in FORMATS[kind].columns)


def _listed(columns: Mapping[str, None]) -> str:
    return f"the columns {', '.join(columns)}" if columns else "no columns"


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
