"""Completions to estimate KL(pi || pi_ref) on: none is chosen by its score, unlike those that are compared."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from raylign.errors import DataError
from raylign.records import Candidate, KlSample, Preference, Prompt


def with_policy_samples(
    preferences: Sequence[Preference],
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    num_generations: int,
    seed: int,
) -> tuple[Preference, ...]:
    """Each preference with a sample of the policy to one of the round's prompts as its KL sample.

    Every prompt is as likely as any other, also one without a preference, and of its candidates every one that the
    policy sampled, also one without a score. Those that the reference sampled (an older version) are left out, and so
    are later attempts (from index `num_generations` on), which only some prompts have, for their scores. A preference
    gets a sample to its own prompt where one is drawn, because that costs no further prompt. Depends on the arguments
    alone.
    """
    newest = max(candidate.policy_version for candidate in candidates)
    pools: dict[str, list[Candidate]] = {prompt.id: [] for prompt in prompts}
    for candidate in candidates:
        if candidate.policy_version == newest and candidate.index < num_generations:
            pools[candidate.prompt_id].append(candidate)
    drawn: dict[str, list[KlSample]] = defaultdict(list)
    rng = random.Random(f"{seed}/kl")
    order = [prompt for prompt in prompts if pools[prompt.id]]
    rng.shuffle(order)
    for prompt in order:
        rng.shuffle(pools[prompt.id])
    for number in range(len(preferences)):
        turn, place = divmod(number, len(order))
        pool = pools[order[place].id]
        drawn[order[place].id].append(_sample(order[place], pool[turn % len(pool)]))
    own = [drawn[preference.prompt.id].pop() if drawn[preference.prompt.id] else None for preference in preferences]
    others = iter([sample for samples in drawn.values() for sample in samples])
    return tuple(
        replace(preference, kl_sample=sample or next(others))
        for preference, sample in zip(preferences, own, strict=True)
    )


def _sample(prompt: Prompt, candidate: Candidate) -> KlSample:
    return KlSample(prompt.token_ids, candidate.token_ids, math.fsum(candidate.logprobs))


def with_mismatched(rows: Sequence[Preference], max_length: int, seed: int, what: str) -> tuple[Preference, ...]:
    """Each row with an answer of another row behind its own prompt as its KL sample: KTO (arXiv 2402.01306), TRL.

    The other row has another prompt; which of its answers it is, is drawn. `max_length` cuts it at its end. Depends on
    the arguments alone. Raises DataError when the rows, called `what`, are all of one prompt.
    """
    groups: dict[tuple[int, ...], list[Preference]] = defaultdict(list)
    for row in rows:
        groups[row.prompt.token_ids].append(row)
    if len(groups) < 2:
        raise DataError(
            f"kto estimates its KL on answers to other prompts, and the {len(rows)} rows {what} have {len(groups)} "
            "different prompt; give at least 2 (data.held_out for the held-out rows)"
        )
    rng = random.Random(f"{seed}/kl")
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    line = [row for group in shuffled for row in group]
    found: dict[str, KlSample] = {}
    start = 0
    for group in shuffled:
        start += len(group)
        for place, row in enumerate(group):
            # The line goes on behind the group; its own rows come last, and are never reached.
            other = line[(start + place % (len(line) - len(group))) % len(line)]
            answer = rng.choice(other.candidates).token_ids
            prompt = row.prompt.token_ids
            found[row.prompt.id] = KlSample(prompt, answer[: max_length - len(prompt)])
    return tuple(replace(row, kl_sample=found[row.prompt.id]) for row in rows)
