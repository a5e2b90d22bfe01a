"""Inputs that nobody meant: valid files with edits, and trees of values of every kind."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

WORDS: tuple[bytes, ...] = (
    b"",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"-1",
    b"0",
    b"010",
    b"1:30",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"Infinity",
    b"1e-400",
    b"9" * 400,
    b"9" * 5000,
    b"2001-01-01",
    b"2001-01-01 00:00:00",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\xc3\x28",
    b"\x1b[2J",
    b"\r\n",
    b"\n",
    b"\t",
    b",",
    b":",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[" * 3000,
    b"{" * 3000,
    b'{"a":' * 2000,
    b"- " * 2000,
    b"&a [*a, *a]",
    b"<<: *a",
    b"!!python/object:os.system",
    b"!!binary aGk=",
    b"!!set {a}",
    b"? [a]\n: b",
    b"{{ 1/0 }}",
    b"{% for m in messages %}",
    b"{% for i in range(10**9) %}",
    b"{{ ''.__class__.__mro__ }}",
    b"{{ messages[99].content }}",
    b"<|im_start|>",
    b"../../etc/passwd",
    b"file:///dev/zero",
    b"%s" * 10,
    b"\xf0\x9f\x92\xa9",
    "\u202e\u0000\u2028".encode(),
)
"""Pieces that have broken readers of text formats."""
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**23, -(10**23), 2**31, 2**63, 10**400, 0.0, 0.5, -0.5, 1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"), "", "a", "0", "1", "none", "null", "../..", "/dev/null", "\x00",
    "\ud800", "\u202e", "x" * 3000, "{{ x }}", "user", "assistant", "system", "tool", "text",
)  # fmt: skip


def edited(seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """One of `seeds` after one to six edits; `words` are the format's own pieces."""
    pieces = st.one_of(st.sampled_from([*words, *WORDS]), st.binary(max_size=12))
    place = st.floats(0, 1, exclude_max=True)
    edit = st.tuples(st.sampled_from(("cut", "repeat", "insert", "replace", "swap", "end")), place, place, pieces)
    return st.tuples(st.sampled_from(list(seeds)), st.lists(edit, min_size=1, max_size=6)).map(_apply)


def _apply(drawn: tuple[bytes, list[tuple[str, float, float, bytes]]]) -> bytes:
    data, edits = drawn
    for kind, first, second, piece in edits:
        at = int(first * (len(data) + 1))
        to = min(len(data), at + int(second * 40))
        match kind:
            case "cut":
                data = data[:at] + data[to:]
            case "repeat":
                data = data[:to] + data[at:]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "replace":
                data = data[:at] + piece + data[to:]
            case "swap":
                data = data[:at] + bytes(reversed(data[at:to])) + data[to:]
            case "end":
                data = data[:at]
    return data


def values() -> st.SearchStrategy[Any]:
    """A JSON-like tree of any shape."""
    scalars = st.one_of(
        st.sampled_from(SCALARS), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=4).map(repr)
    )
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
        max_leaves=8,
    )


def changed(seeds: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of `seeds`, trees of a valid shape, with one to four of its nodes removed, doubled, renamed or replaced."""
    change = st.tuples(st.integers(0, 10**6), st.sampled_from(("remove", "double", "rename", "replace")), values())
    return st.tuples(st.sampled_from(list(seeds)), st.lists(change, min_size=1, max_size=4)).map(_change)


def _change(drawn: tuple[Any, list[tuple[int, str, Any]]]) -> Any:
    tree = json.loads(json.dumps(drawn[0]))
    for number, kind, value in drawn[1]:
        places = list(_places(tree))
        if not places:
            return value
        holder, key = places[number % len(places)]
        match kind:
            case "remove":
                del holder[key]
            case "replace":
                holder[key] = value
            case "rename" if isinstance(holder, dict):
                holder[str(value)[:20]] = holder.pop(key)
            case _ if isinstance(holder, list):
                holder.append(holder[key])
            case _:
                holder[f"{key}_"] = holder[key]
    return tree


def _places(tree: Any) -> Any:
    """Every (holder, key) of a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def as_json(tree: Any) -> bytes:
    """UTF-8 where the texts have such a form; NaN and infinities as Python writes them."""
    return json.dumps(tree).encode()
