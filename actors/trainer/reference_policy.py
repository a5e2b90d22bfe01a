"""What a trainer rank measures log-ratios against, and how it follows the policy from round to round."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.trainer.actor import TrainerSpec
from actors.trainer.deepspeed_engine import frozen_engine, reference_config
from actors.trainer.process_group import Sharding
from actors.trainer.state import own_part, whole
from raylign.config.blocks import TrainerBlock
from raylign.config.reference import (
    ModelReferenceBlock,
    NoReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.models.load import is_adapted, load_policy
from raylign.reference.versions import Pace, pace
from raylign.training.logprobs import CompletionLogps

if TYPE_CHECKING:
    from peft import PeftModel

Storage = Callable[[nn.Parameter], Tensor]
"""This rank's part of a parameter, as it is stored; what is written to it counts from the next use."""


class ReferencePolicy(Protocol):
    """The reference of one rank."""

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """The module that scores under the reference, while the context lasts."""

    def advance(self, rounds: int) -> None:
        """Follow the policy, `rounds` rounds of which are done."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What cannot be loaded from the model's folder; all ranks must ask."""

    def load(self, get: Callable[[str], Tensor]) -> None:
        """Take what `tensors` gave, by name."""


class _Still:
    """A reference that never moves."""

    def advance(self, rounds: int) -> None:
        """It stays where it is."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def load(self, get: Callable[[str], Tensor]) -> None:
        """Nothing to take."""


class DisabledAdapter(_Still):
    """The policy's own base under a disabled adapter: no second model."""

    def __init__(self, policy: "PeftModel", module: nn.Module) -> None:
        self._policy, self._module = policy, module

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        with self._policy.disable_adapter():
            yield self._module


class FrozenCopy(_Still):
    """A second model that stays where it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def scored(self) -> Any:
        """The module itself, a `CompletionLogps`, without an engine around it."""
        return getattr(self._module, "module", self._module)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        yield self._module


class FollowingCopy(FrozenCopy):
    """A second model that is mixed with the policy's weights; an fp32 copy keeps what the dtype would round."""

    def __init__(self, module: nn.Module, policy: nn.Module, pace: Pace, storage: Storage) -> None:
        super().__init__(module)
        self._pace, self._storage = pace, storage
        self._pairs = list(zip(module.parameters(), policy.parameters(), strict=True))
        self._exact = [storage(own).float() for own, _ in self._pairs] if pace.share < 1 else []

    def advance(self, rounds: int) -> None:
        if not self._pace.is_due(rounds):
            return
        with torch.no_grad():
            if not self._exact:
                for own, of_policy in self._pairs:
                    self._storage(own).copy_(self._storage(of_policy))
            for exact, (own, of_policy) in zip(self._exact, self._pairs, strict=bool(self._exact)):
                exact.lerp_(self._storage(of_policy).to(exact), self._pace.share)
                self._storage(own).copy_(exact)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, (own, _) in enumerate(self._pairs):
            yield f"reference/{index}", _whole(own, self._exact[index] if self._exact else self._storage(own))

    def load(self, get: Callable[[str], Tensor]) -> None:
        with torch.no_grad():
            for index, (own, _) in enumerate(self._pairs):
                stored = self._storage(own)
                kept = _part(own, get(f"reference/{index}"))
                if self._exact:
                    self._exact[index].copy_(kept)
                stored.copy_(kept)


class FollowingAdapter:
    """The policy with the adapter weights of an earlier round in place of its own; a rank swaps its part of them."""

    def __init__(self, policy: "PeftModel", module: nn.Module, pace: Pace, storage: Storage) -> None:
        self._module, self._pace, self._storage = module, pace, storage
        self._parameters = [parameter for name, parameter in policy.named_parameters() if ".lora_" in name]
        self._weights = self._copies()

    def _copies(self) -> list[Tensor]:
        return [self._storage(parameter).detach().float().clone() for parameter in self._parameters]

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        current = self._copies()
        self._write(self._weights)
        try:
            yield self._module
        finally:
            self._write(current)

    def _write(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                self._storage(parameter).copy_(weight)

    def advance(self, rounds: int) -> None:
        if self._pace.is_due(rounds):
            for own, of_policy in zip(self._weights, self._copies(), strict=True):
                own.lerp_(of_policy, self._pace.share)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, (parameter, weight) in enumerate(zip(self._parameters, self._weights, strict=True)):
            yield f"reference/{index}", _whole(parameter, weight)

    def load(self, get: Callable[[str], Tensor]) -> None:
        for index, (parameter, weight) in enumerate(zip(self._parameters, self._weights, strict=True)):
            weight.copy_(_part(parameter, get(f"reference/{index}")))


def _whole(parameter: nn.Parameter, kept: Tensor) -> Tensor:
    """All of what this rank has `kept` its part of, where ZeRO-3 shares out `parameter`; every rank must ask."""
    shape = getattr(parameter, "ds_shape", None)
    return kept if shape is None else whole(kept, shape)


def _part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """What this rank keeps of `value`, which is whole."""
    shared: Tensor | None = getattr(parameter, "ds_tensor", None)
    return value if shared is None else own_part(value, shared.numel())


@dataclass(slots=True)
class References:
    """What a rank can measure against: the reference, and the policy before round 1.

    `followed` is the number of rounds that the reference has taken its part of.
    """

    reference: ReferencePolicy | None
    initial: ReferencePolicy | None
    followed: int = 0

    def follow(self, rounds_done: int) -> None:
        """Let the reference take its part of the policy, once for each number of rounds."""
        if rounds_done > self.followed:
            if self.reference:
                self.reference.advance(rounds_done)
            self.followed = rounds_done

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What cannot be loaded from the model's folder; all ranks must ask."""
        return self.reference.tensors() if self.reference else iter(())

    def load(self, get: Callable[[str], Tensor], followed: int) -> None:
        """Take what `tensors` gave, by name, `followed` rounds being in it."""
        if self.reference:
            self.reference.load(get)
        self.followed = followed


def references(
    block: ReferenceBlock,
    policy: "PreTrainedModel | PeftModel",
    module: nn.Module,
    sharding: Sharding,
    copy: Callable[[], nn.Module],
) -> References:
    """`module` wraps the policy; `copy` loads a second, frozen model where one is needed.

    An adapter's base is the policy before round 1, whatever the reference is, and costs nothing.
    """
    initial = DisabledAdapter(policy, module) if is_adapted(policy) else None
    if isinstance(block, SamplerReferenceBlock | NoReferenceBlock):
        return References(None, initial)
    if is_adapted(policy) and not isinstance(block, ModelReferenceBlock):
        return References(adapter_reference(block, policy, module, sharding.stored), initial)
    return References(copied_reference(block, copy(), module, sharding.stored), initial)


def checkpointed(model: "PreTrainedModel | PeftModel", block: TrainerBlock) -> "PreTrainedModel | PeftModel":
    """The model, which computes activations again in its backward pass where that is asked for."""
    if block.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def frozen_copy(spec: TrainerSpec) -> nn.Module:
    """The model of the reference's folder."""
    whole = spec.model.model_copy(update={"lora": None})
    copy = checkpointed(load_policy(spec.reference_folder, whole, spec.seed), spec.trainer)
    copy.requires_grad_(False)
    config = reference_config(spec.model.dtype, zero_stage=spec.trainer.zero_stage)
    frozen: nn.Module = frozen_engine(CompletionLogps(copy), config, spec.model.dtype)
    frozen.eval()
    return frozen


def adapter_reference(
    block: ReferenceBlock, policy: "PeftModel", module: nn.Module, storage: Storage
) -> ReferencePolicy:
    """The reference in the policy's own base, `module` wrapping the policy."""
    follows = pace(block)
    return DisabledAdapter(policy, module) if follows is None else FollowingAdapter(policy, module, follows, storage)


def copied_reference(block: ReferenceBlock, copy: nn.Module, policy: nn.Module, storage: Storage) -> ReferencePolicy:
    """The reference in a second model; `copy` and `policy` are alike."""
    follows = pace(block)
    return FrozenCopy(copy) if follows is None else FollowingCopy(copy, policy, follows, storage)
