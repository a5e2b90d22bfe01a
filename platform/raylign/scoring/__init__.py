"""Scorers judge completions. They never invent a value: what they cannot judge is unscored, with a reason."""

from raylign.scoring.base import Scorer, ScoringItem, check_unscored, most_unscored, skipped
from raylign.scoring.function import FunctionInfo, FunctionScorer, describe_function

__all__ = [
    "FunctionInfo",
    "FunctionScorer",
    "Scorer",
    "ScoringItem",
    "check_unscored",
    "describe_function",
    "most_unscored",
    "skipped",
]
