"""Scorers judge completions. They never invent a value: what they cannot judge is unscored, with a reason.

Every scoring process imports this: what loads models (`load`) is imported by its own name.
"""

from raylign.scoring.base import Compute, ItemScorer, ScoringItem, check_unscored, most_unscored, skipped
from raylign.scoring.batches import batches, longest_s
from raylign.scoring.function import FunctionScorer, describe_function
from raylign.scoring.http_service import HttpScorer
from raylign.scoring.judge import JudgeScorer
from raylign.scoring.locate import FunctionInfo
from raylign.scoring.usage import Usage, Usages, add_up, summary
from raylign.scoring.verifier import VerifierScorer, require_references

__all__ = [
    "Compute",
    "FunctionInfo",
    "FunctionScorer",
    "HttpScorer",
    "JudgeScorer",
    "ItemScorer",
    "ScoringItem",
    "Usage",
    "Usages",
    "VerifierScorer",
    "add_up",
    "batches",
    "check_unscored",
    "describe_function",
    "longest_s",
    "most_unscored",
    "require_references",
    "skipped",
    "summary",
]
