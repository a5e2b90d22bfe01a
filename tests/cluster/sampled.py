"""What a run sampled: whether all of it is there."""

from collections import Counter
from pathlib import Path

from raylign.run.tables import read_candidates


def assert_complete(folder: Path, prompts: int, generations: int) -> None:
    """Every candidate of the round is there once, and scored."""
    candidates, scores = read_candidates(folder / "candidates.parquet")
    count = Counter((candidate.prompt_id, candidate.index) for candidate in candidates)
    assert set(count.values()) == {1}
    assert sorted(index for _, index in count) == sorted(list(range(generations)) * prompts)
    assert len({prompt for prompt, _ in count}) == prompts
    assert all(score.value is not None for score in scores)
