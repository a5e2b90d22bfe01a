"""The demonstration scorer: how positive a completion sounds, by VADER (Hutto and Gilbert 2014)."""

from functools import cache
from typing import Any

from raylign.errors import ScorerError

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    raise ScorerError('the VADER scorer needs a package: pip install "raylign[demo]"') from error


def compound(prompts: list[list[dict[str, Any]]], completions: list[str]) -> list[float]:
    """VADER's compound sentiment of each completion, -1 (negative) to 1 (positive); 0 for an empty one."""
    return [float(_analyzer().polarity_scores(completion)["compound"]) for completion in completions]


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
