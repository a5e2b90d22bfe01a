"""Sources of scoring functions, names of them, texts with secrets, and what scoring processes write."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from raylign.boundary.secrets import (
    holds_secret,
    is_secret,
    names_secret,
    secrets_in,
    without_credentials,
    without_secrets,
)
from raylign.errors import RaylignError
from raylign.scoring.locate import locate_function
from raylign.scoring.process import NoAnswer, read_answers, read_location
from raylign.scoring.relay import LARGEST_ANSWER, NO_CODE, REPLY, Frames, TooLarge, frame
from tests.fuzz.mutations import as_json, changed, edited, values

MODULE = "fuzzed_scores"
SOURCES = [
    b"from json import dumps\n\ndef score(prompts, completions):\n    return [0.5 for _ in completions]\n",
    b"try:\n    from fuzzed_other import score\nexcept ImportError:\n    score = lambda prompts, completions: None\n",
    b"from .fuzzed_scores import score\n",
    b"if True:\n    class score:\n        pass\n",
    b"score: int = 3\n",
]
SOURCE_WORDS = (b"from fuzzed_scores import *\n", b"(" * 300, b"-" * 3000, b"    ", b"score", b"# coding: utf-16\n")
SPECS = [b"json:dumps", b"fuzzed_scores:score", b"os.path:join", b"xml.dom.minidom:parse"]
SPEC_WORDS = (b".", b":", b"..", b"raylign", b"sys", b"builtins", b"/", b"a" * 300, b"__main__")
LONGEST = 1 << 16
LONGEST_MESSAGE = 8000


def source(folder: Callable[[], Path]) -> Callable[[bytes], None]:
    """One that is found with `locate_function`, and read as the first of the import path."""

    def read(data: bytes) -> None:
        place = folder() / "code"
        place.mkdir(exist_ok=True)
        (place / f"{MODULE}.py").write_bytes(data)
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
        locate_function(f"{MODULE}:score", allow_outside=True)

    return read


def spec(data: bytes) -> None:
    locate_function(data.decode("utf-8", "surrogateescape"), allow_outside=True)


PLANTED = "hf_" + "q7" * 20
TEXTS = [
    b"postgresql://user:secret@host:5432/db?sslmode=require&password=abcdefgh",
    b"{'Authorization': 'Bearer abcdefghijkl', 'api_key': \"0123456789abcdef\"}",
    b"hf_abcdefghijklmnopqrstuvwxyz0123456789 and AKIAIOSFODNN7EXAMPLE and sk-ant-REDACTED-0123456789",
    b"-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    b"DB_PASS=abcdefgh PGPASSWORD=abcdefgh; token = 'x y z'",
    b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijk",
]
TEXT_WORDS = (b"://", b"@", b"=", b"eyJ", b"a" * 400, b"password=", b"://a:" * 50, b"?a=" * 50, b"A_" * 200, b"'" * 50)


def texts() -> st.SearchStrategy[bytes]:
    """Some of them very long: nothing may take more than linear time."""
    found = edited(TEXTS, TEXT_WORDS)
    times = st.sampled_from((1, 1, 1, 1000))
    return st.tuples(found, times).map(lambda drawn: (drawn[0] * drawn[1])[:LONGEST])


def secrets(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    clean = without_secrets(f"{text} {PLANTED} {text}")
    assert PLANTED not in clean, f"still a secret in {clean[:200]!r}"
    holds_secret(text)
    without_credentials(text)
    is_secret(text, text)
    names_secret(text)
    list(secrets_in({text: [text, {text: None}]}))


ANSWERS: list[object] = [
    {"answers": [[0.5, "", {"a": 1.0}, True], [None, "why", {}, False]]},
    {"failure": "ValueError: no"},
    {"file": "/a/b.py", "line": 3},
]


def framed(content: bytes) -> bytes:
    return frame(NO_CODE, REPLY + content)


def frames() -> st.SearchStrategy[bytes]:
    whole = [framed(as_json(answer)) for answer in ANSWERS]
    sizes = [struct.pack(">I", size) for size in (0, 1, 2**31, 2**32 - 1)]
    trees = st.one_of(changed(ANSWERS), values()).map(as_json).map(framed)
    return st.one_of(trees, edited(whole, [*sizes, NO_CODE, b"+", b"-"]))


def channel(data: bytes) -> None:
    """As the relay takes it from the scoring process, and the scorer from the relay."""
    found = Frames(LARGEST_ANSWER)
    for start in range(0, len(data), 7):
        found.add(data[start : start + 7])
    try:
        while received := found.take():
            for read in (read_answers, read_location):
                try:
                    read(received[1][1:])
                except NoAnswer as error:
                    assert len(str(error)) < LONGEST_MESSAGE and str(error).isprintable(), str(error)
    except TooLarge as error:
        raise RaylignError(f"{error}; its items stay unscored") from error
