"""Scores from a function of the user's."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from raylign.config.blocks import Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock


class FunctionScoringBlock(LeafScoringBlock):
    """Scores from a Python function `(prompts, completions) -> list[float | None]`."""

    type: Literal["function"] = "function"
    function: str = Field("raylign.scoring.vader:compound", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`; runs in the scorer actor. `plan` shows its file and hash."""
    allow_outside: bool = False
    """Take the function from a file outside the working directory and the installed packages."""
    batch_size: PositiveInt = 64
    """Completions per call."""
    timeout_s: PositiveFloat = 10.0
    """Deadline per item in seconds; an item past it is unscored."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion and file of the function: `run`, a path that runs may share, or null."""
