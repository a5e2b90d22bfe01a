"""Which candidates of a prompt are compared. Pure: what can be paired in, lists of two or more out."""

import random
from collections.abc import Callable, Sequence
from itertools import combinations, product
from statistics import fmean, pstdev
from typing import TypeVar, assert_never

from raylign.config.pairing import (
    AllPairsPairingBlock,
    BestRandomPairingBlock,
    BestSecondPairingBlock,
    BestWorstPairingBlock,
    CorrectWrongPairingBlock,
    GroupPairingBlock,
    LengthMatchedPairingBlock,
    PairingBlock,
    PolicyReferencePairingBlock,
    QuantilePairingBlock,
    RandomWorstPairingBlock,
    RankingPairingBlock,
    SigmaPairingBlock,
    TopMPairingBlock,
)
from raylign.pairing.usable import Scored

Pair = tuple[Scored, Scored]
Selected = Sequence[tuple[Scored, ...]]
Item = TypeVar("Item")
Accepted = Callable[[Scored, Scored], bool]


def select(
    found: Sequence[Scored], block: PairingBlock, accepted: Accepted, samplers: tuple[int, int], seed: str
) -> Selected:
    """The comparisons that `block` makes of at least two candidates, in no order of their own but correct before wrong.

    `accepted` tells whether two candidates pass the filters, for a way of pairing that draws or looks for some that
    do; `samplers` are the group's. Equals go to the lowest index. What is drawn at random depends on `seed` alone.
    """
    order = sorted(found, key=lambda one: -_rank(one, block))
    rng = random.Random(seed)
    match block:
        case BestWorstPairingBlock():
            return [(order[0], min(found, key=lambda one: _rank(one, block)))]
        case BestSecondPairingBlock():
            return [(order[0], other) for other in _below(order, block)[:1]]
        case BestRandomPairingBlock():
            return _drawn(_passing([(order[0], other) for other in _below(order, block)], accepted), 1, rng)
        case RandomWorstPairingBlock():
            worst = min(found, key=lambda one: _rank(one, block))
            above = [(one, worst) for one in order if _rank(one, block) > _rank(worst, block)]
            return _drawn(_passing(above, accepted), 1, rng)
        case CorrectWrongPairingBlock():
            right = [one for one in found if one.score > block.threshold]
            wrong = [one for one in found if one.score <= block.threshold]
            return _drawn(_passing(list(product(right, wrong)), accepted), block.max_pairs, rng)
        case AllPairsPairingBlock():
            pairs = [(one, other) for one, other in combinations(order, 2) if one.value != other.value]
            return pairs if block.max_pairs is None else _drawn(_passing(pairs, accepted), block.max_pairs, rng)
        case TopMPairingBlock():
            m = min(block.m, len(order) // 2)
            return list(product(order[:m], order[-m:]))
        case QuantilePairingBlock():
            return _two(order, _place(block.chosen, len(order)), _place(block.rejected, len(order)))
        case SigmaPairingBlock():
            first = 0 if block.chosen is None else _nearest(order, block.chosen, block)
            return _two(order, first, _nearest(order, block.rejected, block))
        case LengthMatchedPairingBlock():
            return _closest(order, accepted)
        case RankingPairingBlock():
            return [tuple(_spread(order, block.max_candidates))]
        case GroupPairingBlock():
            return [tuple(order)]
        case PolicyReferencePairingBlock():
            of_reference, of_policy = ([one for one in found if one.candidate.policy_version == v] for v in samplers)
            pairs = [(one, other) for one, other in product(of_policy, of_reference) if one is not other]
            return _drawn(pairs, 1, rng)
        case _:
            assert_never(block)


def _rank(one: Scored, block: PairingBlock) -> float:
    return one.value + block.optimism * one.std


def _below(order: Sequence[Scored], block: PairingBlock) -> list[Scored]:
    return [one for one in order if _rank(one, block) < _rank(order[0], block)]


def _drawn(items: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """`count` of the items at most, in their order."""
    keys = [rng.random() for _ in items]
    taken = sorted(sorted(range(len(items)), key=keys.__getitem__)[:count])
    return [items[place] for place in taken]


def _place(quantile: float, count: int) -> int:
    """The place from the best, 0, whose quantile is nearest; of two as near the better one."""
    return min(count - 1, max(0, -int(-((1 - quantile) * (count - 1) - 0.5) // 1)))


def _nearest(order: Sequence[Scored], deviations: float, block: PairingBlock) -> int:
    """The place of the candidate nearest to mean + `deviations` std; of two as near the better one."""
    ranks = [_rank(one, block) for one in order]
    target = fmean(ranks) + deviations * pstdev(ranks)
    return min(range(len(ranks)), key=lambda place: abs(ranks[place] - target))


def _two(order: Sequence[Scored], first: int, second: int) -> Selected:
    """The candidates at both places. If these are one, it and the one below it, or above it where it is the last."""
    if first == second:
        first = min(first, len(order) - 2)
        second = first + 1
    return [(order[first], order[second])]


def _passing(pairs: Sequence[Pair], accepted: Accepted) -> Sequence[Pair]:
    """The pairs that pass the filters; all of them where none does, so that what is wrong with them is told."""
    return [pair for pair in pairs if accepted(*pair)] or pairs


def _closest(order: Sequence[Scored], accepted: Accepted) -> Selected:
    """The pair whose lengths differ least; of equal ones that with the largest gap."""

    def distance(pair: Pair) -> tuple[int, float]:
        one, other = pair
        return abs(len(one.candidate.token_ids) - len(other.candidate.token_ids)), -abs(one.value - other.value)

    return [min(_passing(list(combinations(order, 2)), accepted), key=distance)]


def _spread(order: Sequence[Scored], limit: int | None) -> Sequence[Scored]:
    if limit is None or len(order) <= limit:
        return order
    return [order[place * (len(order) - 1) // (limit - 1)] for place in range(limit)]
