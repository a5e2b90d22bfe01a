"""Which format a source has, told from its first rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.config.data import Format
from raylign.data.formats import alpaca, helpsteer2, hh, sharegpt, trl, ultrafeedback, ultrafeedback_zh
from raylign.data.formats.parts import Cells, Form
from raylign.errors import DataError

FORMATS: Mapping[Format, Form] = {
    "trl": Form(trl.parse, trl.COLUMNS),
    "sharegpt": Form(sharegpt.parse, sharegpt.COLUMNS),
    "alpaca": Form(alpaca.parse, alpaca.COLUMNS),
    "hh": Form(hh.parse, hh.COLUMNS),
    "helpsteer2": Form(helpsteer2.parse, helpsteer2.COLUMNS, helpsteer2.SCALES),
    "ultrafeedback": Form(ultrafeedback.parse, ultrafeedback.COLUMNS, ultrafeedback.SCALES),
    "ultrafeedback_zh": Form(ultrafeedback_zh.parse, ultrafeedback.COLUMNS, ultrafeedback.SCALES),
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
        chinese = language == "zh" or (language is None and ultrafeedback_zh.is_chinese(row["instruction"]))
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
