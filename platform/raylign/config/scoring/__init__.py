"""Who scores the candidates, in one union on `type`."""

from typing import Annotated

from pydantic import Field

from raylign.config.scoring.function import FunctionScoringBlock
from raylign.config.scoring.judge import JudgeScoringBlock

ScoringBlock = FunctionScoringBlock | JudgeScoringBlock
ScoringUnion = Annotated[ScoringBlock, Field(discriminator="type")]

__all__ = ["FunctionScoringBlock", "JudgeScoringBlock", "ScoringBlock", "ScoringUnion"]
