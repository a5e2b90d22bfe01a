"""What every scorer that is no composition lets one say, and says of itself."""

from pathlib import Path
from typing import ClassVar, Literal

from raylign.config.base import Block

CacheOption = Path | Literal["run"] | None
"""`run`: scores.sqlite of the run directory. A path: that file, which runs may share. null: nothing is kept."""


class LeafScoringBlock(Block):
    """A scorer of its own."""

    compares: ClassVar[bool] = False
    """Whether a score depends on the other candidates of the prompt, so that more of them make it another score."""
