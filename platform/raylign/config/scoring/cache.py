"""Where scores are kept, as every scorer that is no composition lets one say it."""

from pathlib import Path
from typing import Literal

CacheOption = Path | Literal["run"] | None
"""`run`: scores.sqlite of the run directory. A path: that file, which runs may share. null: nothing is kept."""
