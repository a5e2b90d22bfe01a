"""Scorers judge completions. They never invent a value: what they cannot judge is unscored, with a reason."""

from raylign.scoring.base import Scorer, ScoringItem, check_unscored, most_unscored, skipped
from raylign.scoring.batches import batches, longest_s
from raylign.scoring.describe import describe_scorer, scorer_name
from raylign.scoring.function import FunctionInfo, FunctionScorer, describe_function
from raylign.scoring.http_service import HttpScorer
from raylign.scoring.judge import JudgeScorer
from raylign.scoring.load import LoadedScorer, load_scorer
from raylign.scoring.usage import Usage, Usages, add_up, summary
from raylign.scoring.verifier import VerifierScorer

__all__ = [
    "FunctionInfo",
    "FunctionScorer",
    "HttpScorer",
    "JudgeScorer",
    "LoadedScorer",
    "Scorer",
    "ScoringItem",
    "Usage",
    "Usages",
    "VerifierScorer",
    "add_up",
    "batches",
    "check_unscored",
    "describe_function",
    "describe_scorer",
    "load_scorer",
    "longest_s",
    "most_unscored",
    "scorer_name",
    "skipped",
    "summary",
]
