"""The outcome of one check."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and the cure unless it is `ok`. `fail`: a run cannot work; `warn`: some runs will not."""

    name: str
    status: Status
    found: str
    cure: str = ""
