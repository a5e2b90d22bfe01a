"""A judge's verdicts on disk, question by question: what is compared again among others is not asked again."""

from collections.abc import Mapping, Sequence

from raylign.records import Prompt, Score
from raylign.scoring.cache import ScoreCache, score_key

Texts = tuple[str, ...]
"""What one question is about: an answer to rate, or two to compare, the one that is called A first."""


class Verdicts:
    """The verdicts of one judge, as numbers: a rating, or the share of the win that goes to the first answer."""

    def __init__(self, cache: ScoreCache | None, identity: str) -> None:
        """Without a `cache` nothing is kept. `identity` is the judge's (`raylign.scoring.identity`)."""
        self._cache, self._identity = cache, identity

    def key(self, prompt: Prompt, texts: Texts) -> bytes:
        """Of a question."""
        return score_key(self._identity, [dict(message) for message in prompt.messages], texts)

    def known(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """Those of `keys` that were answered before."""
        found = {} if self._cache is None else self._cache.get(keys)
        return {key: score.value for key, score in found.items() if score.value is not None}

    def keep(self, answered: Mapping[bytes, float]) -> None:
        if self._cache is not None and answered:
            self._cache.put({key: Score(value) for key, value in answered.items()})
