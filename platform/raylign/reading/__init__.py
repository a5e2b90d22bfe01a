"""Text and files of others: read strictly, within limits, or refused with the reason and the cure."""

from raylign.reading.values import DEEPEST, Refused, plain_problem, shown

__all__ = ["DEEPEST", "Refused", "plain_problem", "shown"]
