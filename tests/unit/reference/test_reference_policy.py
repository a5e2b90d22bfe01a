"""References that stay, follow and swap, without any distributed machinery."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from actors.trainer.reference_policy import DisabledAdapter, FollowingAdapter, FollowingCopy, FrozenCopy
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.records import Completions
from raylign.reference.versions import Pace, pace
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import token_batch
from tests.unit.tiny_models import tiny

BATCH = token_batch([Completions((3, 4), ((5, 6), (7,)))], "shared", 0)


def adapted() -> tuple[PeftModel, CompletionLogps]:
    """A policy with an adapter that is not the identity, and the module around it."""
    torch.manual_seed(0)
    policy: PeftModel = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    move(policy)
    return policy, CompletionLogps(policy)


def adapter(policy: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for name, parameter in policy.named_parameters() if ".lora_" in name]


def move(policy: nn.Module) -> None:
    """An optimizer step of some kind."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.3)


def logps(module: nn.Module) -> list[float]:
    with torch.no_grad():
        found: list[float] = module(BATCH).logps.tolist()
    return found


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (InitialReferenceBlock(), None),
        (ModelReferenceBlock(path="x"), None),
        (SamplerReferenceBlock(), None),
        (NoReferenceBlock(), None),
        (PreviousRoundReferenceBlock(), Pace(1.0, 1)),
        (EveryReferenceBlock(n=3), Pace(1.0, 3)),
        (EmaReferenceBlock(alpha=0.25), Pace(0.25, 1)),
    ],
)
def test_the_pace_of_each_block(block: ReferenceBlock, expected: Pace | None) -> None:
    assert pace(block) == expected


def test_a_reference_follows_after_every_nth_round_and_not_before_the_first() -> None:
    assert [rounds for rounds in range(8) if Pace(1.0, 3).is_due(rounds)] == [3, 6]
    assert [rounds for rounds in range(4) if Pace(0.5, 1).is_due(rounds)] == [1, 2, 3]


def test_a_disabled_adapter_is_the_base_and_comes_back() -> None:
    policy, module = adapted()
    reference, on = DisabledAdapter(policy, module), logps(module)
    reference.advance(5)
    with reference.scoring() as scorer:
        assert logps(scorer) == pytest.approx(logps(CompletionLogps(tiny())))
    assert logps(module) == on != logps(CompletionLogps(tiny()))
    with pytest.raises(ZeroDivisionError), reference.scoring():
        raise ZeroDivisionError
    assert logps(module) == on


def test_a_frozen_copy_stays() -> None:
    module = nn.Linear(2, 2)
    reference, before = FrozenCopy(module), module.weight.detach().clone()
    reference.advance(1)
    with reference.scoring() as scorer:
        assert scorer is module and torch.equal(module.weight, before)


def scalar(value: float, dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full((3,), value, dtype=dtype))])


def stored(parameter: nn.Parameter) -> Tensor:
    return parameter.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hard_update_copies_the_policy_every_nth_round(dtype: torch.dtype) -> None:
    own, policy = scalar(0.0, dtype), scalar(0.3, dtype)
    reference = FollowingCopy(own, policy, Pace(1.0, 2), stored)
    found = []
    for rounds in range(5):
        reference.advance(rounds)
        with reference.scoring() as scorer:
            found.append(torch.equal(next(scorer.parameters()), policy[0]))
        with torch.no_grad():
            policy[0].add_(1.0)
    assert found == [False, False, True, False, True]


def test_a_soft_update_by_hand() -> None:
    """0 -> 0.6 -> 0.6 * 2 + 0.4 * 0.6 = 1.44."""
    own, policy = scalar(0.0), scalar(1.0)
    reference = FollowingCopy(own, policy, Pace(0.6, 1), stored)
    reference.advance(0)
    assert own[0].tolist() == [0.0] * 3
    reference.advance(1)
    assert own[0].tolist() == pytest.approx([0.6] * 3)
    nn.init.constant_(policy[0], 2.0)
    reference.advance(2)
    assert own[0].tolist() == pytest.approx([1.44] * 3) and policy[0].tolist() == [2.0] * 3


def test_small_steps_are_not_lost_to_bf16() -> None:
    """From 1 towards 1.5 by 0.5 % a round: a single step of 0.0025 is under half of bf16's spacing of 0.0078."""
    own, policy = scalar(1.0, torch.bfloat16), scalar(1.5, torch.bfloat16)
    reference = FollowingCopy(own, policy, Pace(0.005, 1), stored)
    reference.advance(1)
    assert own[0].tolist() == [1.0] * 3
    for rounds in range(2, 201):
        reference.advance(rounds)
    expected = 1.5 - 0.5 * 0.995**200
    assert own[0].dtype == torch.bfloat16 and torch.equal(own[0], torch.full((3,), expected, dtype=torch.bfloat16))


def test_a_copy_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        FollowingCopy(scalar(0.0), nn.ParameterList([*scalar(0.0), *scalar(0.0)]), Pace(0.5, 1), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_an_earlier_round_scores_and_the_present_one_comes_back(dtype: torch.dtype) -> None:
    policy, module = adapted()
    nn.Module.to(policy, dtype)
    first, at_first = adapter(policy), logps(module)
    reference = FollowingAdapter(policy, module, Pace(1.0, 1), stored)
    move(policy)
    now, at_now = adapter(policy), logps(module)
    assert at_now != at_first
    with reference.scoring() as scorer:
        assert equal(adapter(policy), first) and logps(scorer) == at_first
    assert equal(adapter(policy), now) and logps(module) == at_now


def test_the_present_adapter_comes_back_when_scoring_fails() -> None:
    policy, module = adapted()
    reference = FollowingAdapter(policy, module, Pace(1.0, 1), stored)
    move(policy)
    now = adapter(policy)
    with pytest.raises(ZeroDivisionError), reference.scoring():
        assert not equal(adapter(policy), now)
        raise ZeroDivisionError
    assert equal(adapter(policy), now)


def test_an_adapter_follows_every_nth_round() -> None:
    policy, module = adapted()
    reference = FollowingAdapter(policy, module, Pace(1.0, 2), stored)
    states = [adapter(policy)]
    found = []
    for rounds in range(5):
        reference.advance(rounds)
        with reference.scoring():
            found.append(next(i for i, state in enumerate(states) if equal(adapter(policy), state)))
        move(policy)
        states.append(adapter(policy))
    assert found == [0, 0, 2, 2, 4]


def test_an_adapter_follows_softly_in_fp32() -> None:
    """After each round 0.6 of the policy; the mixture is of fp32 values, whatever the adapter's dtype."""
    policy, module = adapted()
    nn.Module.to(policy, torch.bfloat16)
    reference = FollowingAdapter(policy, module, Pace(0.6, 1), stored)
    mixed = [weight.float() for weight in adapter(policy)]
    for rounds in (1, 2):
        move(policy)
        mixed = [torch.lerp(old, new.float(), 0.6) for old, new in zip(mixed, adapter(policy), strict=True)]
        reference.advance(rounds)
    with reference.scoring():
        assert equal(adapter(policy), [weight.bfloat16() for weight in mixed])


def test_optimizer_state_and_gradients_outlive_a_swap() -> None:
    """The parameters stay the same tensors: an optimizer that holds them trains on."""
    policy, module = adapted()
    trained: list[Any] = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    places = [parameter.data_ptr() for parameter in trained]
    module(BATCH).logps.sum().backward()
    with FollowingAdapter(policy, module, Pace(1.0, 1), stored).scoring():
        pass
    assert [parameter.data_ptr() for parameter in trained] == places
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in trained)
