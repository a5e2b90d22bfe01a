"""What a trainer rank learns: a policy by a preference loss, or a reward model. The rank asks nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raylign.config.blocks import ModelBlock
from raylign.config.losses import LossBlock, RewardLossBlock, TrainerLoss
from raylign.config.losses.reward_model import RewardLossBase
from raylign.errors import TrainerError
from raylign.losses import LossOutput, LossState, next_state, preference_loss, under_new_reference
from raylign.losses.reward_model import require_pairs, reward_loss
from raylign.models.load import load_policy, require_fit
from raylign.models.reward_model import load_reward_model, require_reward_fit
from raylign.training import metrics, reward_metrics
from raylign.training.logprobs import CompletionLogps
from raylign.training.pieces import Scores, of_policy, of_rewards
from raylign.training.preferences import PreferenceBatch, loss_input, placed, without_kl_samples
from raylign.training.rewards import CompletionRewards
from raylign.training.weights import Gather

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Totals:
    """A micro-batch's part of the metrics, fp64: `sums` add up, of `highest` the highest counts."""

    sums: Tensor
    highest: Tensor

    @classmethod
    def of_all(cls, parts: "Sequence[Totals]") -> "Totals":
        """Those of several micro-batches, still where these are."""
        return cls(
            torch.stack([part.sums for part in parts]).sum(0), torch.stack([part.highest for part in parts]).amax(0)
        )

    def on_host(self) -> "Totals":
        """In one copy: the only time that metrics wait for a GPU."""
        sums, highest = torch.split(torch.cat([self.sums, self.highest]).cpu(), [len(self.sums), len(self.highest)])
        return Totals(sums, highest)


class Learner(Protocol):
    """The model in training and what belongs to it."""

    @property
    def model(self) -> "PreTrainedModel | PeftModel":
        """The model itself."""

    @property
    def has_reference(self) -> bool:
        """Whether it can be measured against a reference policy."""

    def module(self) -> nn.Module:
        """What DeepSpeed's engine wraps: one call scores the completions of a `TokenBatch`."""

    def take_loss(self, loss: TrainerLoss) -> None:
        """From now on measure by `loss`, which is of the same kind. Raises TrainerError where it is not."""

    def measure(self, scores: Scores, batch: PreferenceBatch, state: LossState) -> tuple[LossOutput, Totals]:
        """Losses of `batch`, whose completions got `scores` from what `module()` makes."""

    def metrics(self, totals: Totals, own: Sequence[str]) -> Mapping[str, float]:
        """Means over all micro-batches and ranks; `own` are the names of what the loss logs itself."""

    def next_state(self, state: LossState, means: Mapping[str, float]) -> LossState:
        """The state of the next step, from the metrics of this one."""

    def under_new_reference(self, state: LossState, means: Mapping[str, float]) -> LossState:
        """The state when the reference has become another one, from the metrics of the next step's preferences."""


def learner_of(loss: TrainerLoss, folder: str, block: ModelBlock, seed: int, writable: Gather) -> Learner:
    """The learner of `loss`, with the model of `folder` loaded; `writable` as for `load_reward_model`."""
    if isinstance(loss, RewardLossBase):
        return RewardLearner(load_reward_model(folder, block, seed, writable), loss)
    return PolicyLearner(load_policy(folder, block, seed), loss)


def require_learnable(loss: TrainerLoss, folder: str, block: ModelBlock) -> None:
    """Raises ModelError unless the files of `folder` have the weights that `loss` is trained on; none are read."""
    require = require_reward_fit if isinstance(loss, RewardLossBase) else require_fit
    require(folder, block.trust_remote_code)


def _other_kind(loss: TrainerLoss) -> TrainerError:
    return TrainerError(
        f"a round with loss_type={loss.loss_type}, and the model in training learns by another kind of loss; "
        "begin another run"
    )


class PolicyLearner:
    """A policy in training by a preference loss or on demonstrations."""

    has_reference = True

    def __init__(self, model: "PreTrainedModel | PeftModel", loss: LossBlock) -> None:
        self.model, self._loss = model, loss

    def module(self) -> nn.Module:
        return CompletionLogps(self.model)

    def take_loss(self, loss: TrainerLoss) -> None:
        if isinstance(loss, RewardLossBase):
            raise _other_kind(loss)
        self._loss = loss

    def measure(self, scores: Scores, batch: PreferenceBatch, state: LossState) -> tuple[LossOutput, Totals]:
        own, kl_logratios = without_kl_samples(batch, of_policy(scores))
        loss = preference_loss(loss_input(batch, own, kl_logratios), self._loss, state)
        sums = metrics.sums(loss, own, batch)
        return loss, Totals(sums, sums.new_empty(0))

    def metrics(self, totals: Totals, own: Sequence[str]) -> Mapping[str, float]:
        return metrics.finish(totals.sums, own)

    def next_state(self, state: LossState, means: Mapping[str, float]) -> LossState:
        return next_state(state, self._loss, means)

    def under_new_reference(self, state: LossState, means: Mapping[str, float]) -> LossState:
        return under_new_reference(state, self._loss, means)


class RewardLearner:
    """A reward model in training."""

    has_reference = False

    def __init__(self, model: "PreTrainedModel | PeftModel", loss: RewardLossBlock) -> None:
        self.model, self._loss = model, loss

    def module(self) -> nn.Module:
        return CompletionRewards(self.model)

    def take_loss(self, loss: TrainerLoss) -> None:
        if not isinstance(loss, RewardLossBase):
            raise _other_kind(loss)
        self._loss = loss

    def measure(self, scores: Scores, batch: PreferenceBatch, state: LossState) -> tuple[LossOutput, Totals]:
        rewards = of_rewards(scores)
        require_pairs(batch.sizes, self._loss)
        loss = reward_loss(placed(batch, rewards), batch.scores, batch.mask, self._loss)
        return loss, Totals(reward_metrics.sums(loss, rewards, batch), reward_metrics.extremes(rewards, batch))

    def metrics(self, totals: Totals, own: Sequence[str]) -> Mapping[str, float]:
        return reward_metrics.finish(totals.sums, totals.highest)

    def next_state(self, state: LossState, means: Mapping[str, float]) -> LossState:
        return state

    def under_new_reference(self, state: LossState, means: Mapping[str, float]) -> LossState:
        return state
