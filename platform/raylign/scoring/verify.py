"""Comparison of completions with reference answers; runs in the verifying process, whose main thread takes alarms."""

import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from math_verify import parse
from math_verify import verify as same_maths

from raylign.records import Score
from raylign.scoring.ifeval import follows, read_instructions

EXTRACTED = "extracted"
_SHOWN = 80
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_PLAIN = re.compile(r"[\s\d.,+\-/%]+")
Compare = Callable[[str, str], Score]

# Its timeouts are whole seconds per step; ours is per item, and it would warn that they are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class _Late(BaseException):
    """Time is up. No `except Exception` of a library may take it."""


def verify(answers: Sequence[str], completions: Sequence[str], rules: Mapping[str, Any]) -> list[Score]:
    """One score per completion: 1 where it has its answer, 0 where not. `rules` are those of the config block."""
    compare = _comparison(rules)
    return [
        _within(rules["timeout_s"], compare, answer, completion)
        for answer, completion in zip(answers, completions, strict=True)
    ]


def _comparison(rules: Mapping[str, Any]) -> Compare:
    match rules["method"]:
        case "regex":
            return _Found(rules["pattern"])
        case "exact_match":
            return _Extracted(rules, _SameText(strip=rules["strip"], casefold=rules["casefold"]))
        case "math":
            return _Extracted(rules, _SameMaths(bare=rules["extract"] is not None))
        case "ifeval":
            return lambda answer, completion: follows(read_instructions(answer), completion)
        case method:
            raise ValueError(f"method={method!r}")


class _Found:
    """Whether a pattern is found, with {answer} in it taken literally."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __call__(self, answer: str, completion: str) -> Score:
        pattern = self._pattern.replace("{answer}", re.escape(answer))
        return Score(float(re.search(pattern, completion) is not None))


class _Extracted:
    """Compares what patterns take out of the two texts."""

    def __init__(self, rules: Mapping[str, Any], compare: Compare) -> None:
        self._of_completion, self._of_answer, self._compare = rules["extract"], rules["extract_answer"], compare

    def __call__(self, answer: str, completion: str) -> Score:
        wanted = _last(self._of_answer, answer)
        if wanted is None:
            return Score(None, reason=f"extract_answer finds nothing in the reference {_shown(answer)}")
        found = _last(self._of_completion, completion)
        if found is None:
            return Score(0.0, {EXTRACTED: 0.0})
        score = self._compare(wanted, found)
        return score if self._of_completion is None else Score(score.value, {EXTRACTED: 1.0}, score.reason)


class _SameText:
    """Whether two texts are one, but for spaces and capitals if those do not count."""

    def __init__(self, *, strip: bool, casefold: bool) -> None:
        self._strip, self._casefold = strip, casefold

    def __call__(self, answer: str, completion: str) -> Score:
        return Score(float(self._normal(answer) == self._normal(completion)))

    def _normal(self, text: str) -> str:
        spaced = " ".join(text.split()) if self._strip else text
        return spaced.casefold() if self._casefold else spaced


class _SameMaths:
    """Whether two texts are the same mathematics; `bare` completions are answers alone, without words around them."""

    def __init__(self, *, bare: bool) -> None:
        self._bare = bare

    def __call__(self, answer: str, completion: str) -> Score:
        if answer.split() == completion.split():
            return Score(1.0)
        wanted = parse(_as_maths(answer), parsing_timeout=None, raise_on_error=True)
        if not wanted:
            return Score(None, reason=f"no mathematics in the reference {_shown(answer)}")
        # Nothing that reads as mathematics is a wrong answer.
        found = parse(_as_maths(completion) if self._bare else completion, parsing_timeout=None)
        return Score(float(same_maths(wanted, found, timeout_seconds=None, raise_on_error=True)))


def _as_maths(answer: str) -> str:
    """LaTeX without marks is only read between dollars; plain numbers are better read without."""
    return answer if _MARKED.search(answer) or _PLAIN.fullmatch(answer) else f"${answer}$"


def _last(pattern: str | None, text: str) -> str | None:
    """Group 1, else all, of the last match; None without one. The whole text where there is no pattern."""
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return last[1] if last.re.groups else last[0]


def _within(seconds: float, compare: Compare, answer: str, completion: str) -> Score:
    try:
        with _alarm(seconds):
            return compare(answer, completion)
    except _Late:
        return Score(None, reason=f"no verdict within {seconds:g} s")
    except Exception as error:
        return Score(None, reason=f"cannot be compared ({type(error).__name__}: {error})")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """_Late in the main thread when time is up. Code that never returns to Python is ended by the parent process."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")
