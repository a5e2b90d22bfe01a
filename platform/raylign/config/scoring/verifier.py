"""Scores from a comparison with a reference answer."""

import re
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from raylign.config.blocks import Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock

ANSWER = "{answer}"


class VerifierScoringBlock(LeafScoringBlock):
    """1 for a completion that has the reference answer of its prompt's row, else 0. No code is ever run.

    `math` compares as mathematics with the Math-Verify library, so that 1/2 is 0.5 and \\frac{1}{2}; it reads the last
    expression of a completion, a boxed one first. Letters and words are no mathematics: take `exact_match` for them,
    which compares text. `regex` looks for `pattern`.
    """

    type: Literal["verifier"] = "verifier"
    method: Literal["math", "exact_match", "regex"] = "math"
    """How a completion is compared with the answer."""
    answer_column: str = Field("answer", min_length=1)
    """Column of the prompt's row with the reference answer; an item without one is unscored."""
    extract: str | None = None
    """Regular expression: group 1 (else all) of its last match is the completion's answer, no match scores 0."""
    extract_answer: str | None = None
    """The same for the reference, as `#### (.*)` for GSM8K; a row without a match is unscored."""
    pattern: str | None = None
    """`method: regex` only: scores 1 where it is found; {answer} in it stands for the reference, taken literally."""
    strip: bool = True
    """`exact_match` only: spaces around an answer do not count, and inside it one is as good as many."""
    casefold: bool = True
    """`exact_match` only: capitals do not count."""
    batch_size: PositiveInt = 64
    """Completions per call of the verifying process."""
    timeout_s: PositiveFloat = 5.0
    """Deadline per item in seconds; an item past it is unscored."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by completion and answer: `run`, a path that runs may share, or null."""

    @field_validator("extract", "extract_answer", "pattern")
    @classmethod
    def patterns_compile(cls, pattern: str | None) -> str | None:
        try:
            re.compile((pattern or "").replace(ANSWER, "x"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); correct it") from error
        return pattern

    @model_validator(mode="after")
    def pattern_goes_with_regex(self) -> Self:
        if self.method == "regex" and self.pattern is None:
            raise ValueError("method=regex needs pattern, for example pattern='Answer: {answer}$'")
        if self.method != "regex" and self.pattern is not None:
            raise ValueError(
                f"pattern={self.pattern!r} is for method=regex, not {self.method}; use extract to find answers"
            )
        return self

    @property
    def needs_answer(self) -> bool:
        """Whether the reference answer decides the score."""
        return self.method != "regex" or ANSWER in (self.pattern or "")
