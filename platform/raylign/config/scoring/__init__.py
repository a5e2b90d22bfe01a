"""Who scores the candidates, in one union on `type`."""

from raylign.config.scoring.composition import (
    MEAN,
    STD,
    Composition,
    CompositionBlock,
    EnsembleBlock,
    GateScoringBlock,
    LeafBlock,
    MeanStdScoringBlock,
    MinScoringBlock,
    ScoringBlock,
    ScoringUnion,
    WeightedScoringBlock,
    leaves,
)
from raylign.config.scoring.function import FunctionScoringBlock
from raylign.config.scoring.http_service import HttpScoringBlock
from raylign.config.scoring.implicit import ImplicitScoringBlock
from raylign.config.scoring.judge import JudgeScoringBlock
from raylign.config.scoring.model import ModelScoringBlock
from raylign.config.scoring.reward_model import RewardModelScoringBlock
from raylign.config.scoring.verifier import ANSWER, VerifierScoringBlock

__all__ = [
    "ANSWER",
    "MEAN",
    "STD",
    "Composition",
    "CompositionBlock",
    "EnsembleBlock",
    "FunctionScoringBlock",
    "GateScoringBlock",
    "HttpScoringBlock",
    "ImplicitScoringBlock",
    "JudgeScoringBlock",
    "LeafBlock",
    "MeanStdScoringBlock",
    "MinScoringBlock",
    "ModelScoringBlock",
    "RewardModelScoringBlock",
    "ScoringBlock",
    "ScoringUnion",
    "VerifierScoringBlock",
    "WeightedScoringBlock",
    "leaves",
]
