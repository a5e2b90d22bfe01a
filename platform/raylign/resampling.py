"""More candidates for prompts that gave no pair."""

from collections.abc import Sequence
from dataclasses import replace

from raylign.records import Candidate, Prompt, Score


def attempt_seed(run_seed: int, attempt: int) -> int:
    """The seed that takes the run's place in attempt `attempt` (0 is the first) at sampling a round."""
    return run_seed + attempt * 1_000_003


def joined(
    prompts: Sequence[Prompt],
    first: tuple[Sequence[Candidate], Sequence[Score]],
    more: tuple[Sequence[Candidate], Sequence[Score]],
) -> tuple[list[Candidate], list[Score]]:
    """The candidates of both with their scores, prompt-major; a prompt's later ones are numbered on."""
    found: dict[str, list[tuple[Candidate, Score]]] = {prompt.id: [] for prompt in prompts}
    for candidates, scores in (first, more):
        for candidate, score in zip(candidates, scores, strict=True):
            group = found[candidate.prompt_id]
            group.append((replace(candidate, index=len(group)), score))
    pairs = [pair for prompt in prompts for pair in found[prompt.id]]
    return [candidate for candidate, _ in pairs], [score for _, score in pairs]
