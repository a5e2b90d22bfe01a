"""Which prompts a round uses: a pure function of the round's number, so that a resumed run draws the same."""

import random
from collections.abc import Sequence

from raylign.errors import PromptError
from raylign.records import Prompt


def draw(prompts: Sequence[Prompt], round_index: int, count: int, seed: int) -> tuple[Prompt, ...]:
    """The `count` prompts of round `round_index` (from 1), all different.

    Rounds of the same `count` walk through seeded permutations of `prompts`: each prompt once per permutation, a new
    permutation when the last is used up. Raises PromptError when `count` exceeds the prompts there are.
    """
    if round_index < 1 or count < 1:
        raise ValueError(f"round_index={round_index} and count={count} must be at least 1")
    size = len(prompts)
    if count > size:
        raise PromptError(
            f"schedule.prompts_per_round={count} exceeds the {size} training prompts; lower it or add prompts"
        )
    turn, offset = divmod((round_index - 1) * count, size)
    order = shuffled(size, seed, 0)
    for earlier in range(turn):
        order = _following(order, earlier + 1, count, seed)
    taken = order[offset : offset + count]
    if len(taken) < count:
        taken += _following(order, turn + 1, count, seed)[: count - len(taken)]
    return tuple(prompts[index] for index in taken)


def _following(previous: list[int], turn: int, count: int, seed: int) -> list[int]:
    """Permutation number `turn`, begun so that a round which started in the previous one repeats nothing."""
    size = len(previous)
    order = shuffled(size, seed, turn)
    started = (turn * size) % count
    if not started:
        return order
    used = set(previous[-started:])
    first = [index for index in order if index not in used][: count - started]
    leading = set(first)
    return first + [index for index in order if index not in leading]


def shuffled(size: int, seed: int, turn: int) -> list[int]:
    """Permutation number `turn` of 0..size-1.

    Python keeps `random()` the same for a seed across versions; it promises nothing for `shuffle`.
    """
    generator = random.Random(f"{seed}/{turn}")
    keys = [generator.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)
