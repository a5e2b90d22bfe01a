"""What the driver makes of the answers of several trainer ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.trainer.group import TrainerGroup
from raylign.config.losses import GrpoLossBlock, LossBlock, SigmoidLossBlock
from raylign.config.reference import (
    InitialReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.records import Candidate, Completions, KlSample, Preference, Prompt, ReferenceLogps


class Ranks:
    """Ranks that answer at once, with what `shares` says; `calls` is what they were asked."""

    def __init__(
        self,
        reference: ReferenceBlock,
        shares: Sequence[Any],
        tail_weight: float | None = None,
        loss: LossBlock | None = None,
    ) -> None:
        handles: list[Any] = [None] * len(shares)
        loss = loss or SigmoidLossBlock(ld_alpha=tail_weight)
        self.calls: list[tuple[Any, ...]] = []
        self._shares = list(shares)
        self.group = TrainerGroup(handles, loss=loss, reference=reference, step_timeout_s=1.0, ask_ranks=self._answer)

    def _answer(self, ranks: Any, timeout_s: float, what: str, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        self.calls.append((method.__name__, *args))
        return self._shares


def preference(*lengths: int) -> Preference:
    """Candidates of which every token was sampled with -1 nat."""
    candidates = tuple(
        Candidate("p", i, (5,) * length, (-1.0,) * length, "", "stop", 0, 0) for i, length in enumerate(lengths)
    )
    return Preference(Prompt("p", (), (1,)), candidates, (1.0,) * len(lengths), (1.0,) * len(lengths))


def test_rows_come_back_in_order_from_ranks_that_took_them_in_turn() -> None:
    rows = [Completions((1,), ((number,),)) for number in range(5)]
    group = Ranks(InitialReferenceBlock(), [[[[0.0]], [[3.0]]], [[[1.0]], [[4.0]]], [[[2.0]]]])
    assert group.group.reference_logprobs(rows) == [[[0.0]], [[1.0]], [[2.0]], [[3.0]], [[4.0]]]
    assert group.calls == [("reference_logprobs", rows)]


def test_ranks_without_a_reference_have_nothing_to_say() -> None:
    assert Ranks(NoReferenceBlock(), [[], []]).group.reference_logprobs([Completions((1,), ((2,),))]) == []


@pytest.mark.parametrize("block", [InitialReferenceBlock(), PreviousRoundReferenceBlock()])
def test_every_preference_gets_the_log_probs_of_the_rank_that_had_it(block: ReferenceBlock) -> None:
    first = {2: ReferenceLogps((-1.0, -2.0)), 0: ReferenceLogps((-3.0, -4.0))}
    group = Ranks(block, [first, {1: ReferenceLogps((-5.0, -6.0, -7.0))}])
    preferences = [preference(1, 1), preference(1, 1, 1), preference(2, 2)]
    found = group.group.with_reference(preferences, seed=3, rounds_done=1)
    assert [p.reference_logps for p in found] == [(-3.0, -4.0), (-5.0, -6.0, -7.0), (-1.0, -2.0)]
    assert group.calls == [("reference_candidates", preferences, 3, 1)]
    assert [p.candidates for p in found] == [p.candidates for p in preferences]


def test_a_kl_sample_gets_its_log_prob_beside_the_candidates() -> None:
    with_sample = replace(preference(1, 1), kl_sample=KlSample((1,), (5, 5), sampler_logp=-7.0))
    (found,) = Ranks(InitialReferenceBlock(), [{0: ReferenceLogps((-1.0, -2.0), -3.0)}]).group.with_reference(
        [with_sample], 0, 0
    )
    assert found.reference_logps == (-1.0, -2.0) and found.kl_sample == KlSample((1,), (5, 5), -7.0, -3.0)
    (found,) = Ranks(SamplerReferenceBlock(), [{}]).group.with_reference([with_sample], 0, 0)
    assert found.reference_logps == (-1.0, -1.0) and found.kl_sample == KlSample((1,), (5, 5), -7.0, -7.0)


GRPO = GrpoLossBlock(beta=0.1)


def test_the_sampler_is_a_reference_token_by_token_too() -> None:
    """And the policy that the round found is asked beside it; a round of one step has no answer to that."""
    old = {0: ((-2.0,), (-3.0, -4.0))}
    for shares, expected in (([old], old[0]), ([{}], ())):
        group = Ranks(SamplerReferenceBlock(), shares, loss=GRPO)
        (found,) = group.group.with_reference([preference(1, 2)], seed=3, rounds_done=0)
        assert found.reference_logprobs == ((-1.0,), (-1.0, -1.0)) and found.reference_logps == (-1.0, -2.0)
        assert found.old_logprobs == expected
        ((method, (asked,), seed),) = group.calls
        assert (method, asked.reference_logps, seed) == ("old_logprobs", (-1.0, -2.0), 3)


def test_without_a_reference_its_log_probs_are_0_and_no_rank_is_asked() -> None:
    group = Ranks(NoReferenceBlock(), [{}])
    found = group.group.with_reference([preference(2, 1), preference(1, 2, 3)], seed=0, rounds_done=0)
    assert [p.reference_logps for p in found] == [(0.0, 0.0), (0.0, 0.0, 0.0)] and group.calls == []


@pytest.mark.parametrize(("tail_weight", "expected"), [(None, (-3.0, -1.0)), (1.0, (-3.0, -1.0)), (0.5, (-2.0, -1.0))])
def test_the_sampler_is_asked_by_what_it_left(tail_weight: float | None, expected: tuple[float, ...]) -> None:
    """With the loss's own weight on tokens beyond the shorter completion, as the policy's log-probs have it."""
    group = Ranks(SamplerReferenceBlock(), [{}], tail_weight)
    (found,) = group.group.with_reference([preference(3, 1)], seed=0, rounds_done=0)
    assert found.reference_logps == expected and group.calls == []
