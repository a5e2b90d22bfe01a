"""Scorers judge completions. They never invent a value: what they cannot judge is unscored, with a reason."""

from raylign.scoring.base import Scorer, ScoringItem, check_unscored, most_unscored, skipped
from raylign.scoring.batches import batches, longest_s
from raylign.scoring.describe import describe_scorer
from raylign.scoring.function import FunctionInfo, FunctionScorer, describe_function
from raylign.scoring.judge import JudgeScorer

__all__ = [
    "FunctionInfo",
    "FunctionScorer",
    "JudgeScorer",
    "Scorer",
    "ScoringItem",
    "batches",
    "check_unscored",
    "describe_function",
    "describe_scorer",
    "longest_s",
    "most_unscored",
    "skipped",
]
