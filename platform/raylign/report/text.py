"""Values as people read them; text from a model or from user code is made safe to print."""

import re
import unicodedata

_JOINERS = "\u200c\u200d"


def escape_control(text: str, keep: str = "") -> str:
    r"""`text` with terminal controls, bidi overrides and lone surrogates written out (`\x1b`); `keep` is let through.

    Spaces of every script stay, and so do the joiners that Persian, Hindi and emoji need.
    """
    return "".join(char if char in keep or _is_harmless(char) else _written_out(char) for char in text)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs"


def _written_out(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def without_images(text: str) -> str:
    """For pages that read text as Markdown, as MLflow's do: a browser would ask for an image wherever it is."""
    return text.replace("![", "!\\[")


def one_line(text: str, most: int | None = None) -> str:
    """`text` as one line that is safe to print, at most `most` characters of it."""
    line = escape_control(" ".join(text.split()))
    return line if most is None or len(line) <= most else f"{line[: most - 1]}…"


def inline(text: str) -> str:
    """One line of Markdown that reads as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def optional(value: float | None) -> str:
    """Two decimals, or a dash for what was not measured."""
    return "-" if value is None else f"{value:z.2f}"
