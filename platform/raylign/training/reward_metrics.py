"""A reward model's metrics: our `rewards/*` and TRL's names, as sums and extremes over micro-batches and ranks."""

import torch
from torch import Tensor

from raylign.losses import LossOutput
from raylign.training.preferences import PreferenceBatch

_PER_PREFERENCE = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_TRL = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""TRL's RewardTrainer has other names for these."""
NAMES = (*_PER_PREFERENCE, *_TRL, "mean_reward", "min_reward", "max_reward", "num_tokens")


def sums(loss: LossOutput, rewards: Tensor, batch: PreferenceBatch) -> Tensor:
    """One micro-batch's totals, fp64, of `rewards` [C]; fillers (weight 0) add nothing. Add them up, then `finish`.

    They stay where the batch is.
    """
    real = (batch.weights > 0).float()
    of_candidates = _real_candidates(batch)
    totals = [
        (loss.losses.detach() * batch.weights).sum(),
        (loss.chosen_rewards * real).sum(),
        (loss.rejected_rewards * real).sum(),
        ((loss.chosen_rewards - loss.rejected_rewards) * real).sum(),
        ((loss.chosen_rewards > loss.rejected_rewards) * real).sum(),
        torch.where(of_candidates, rewards.detach(), 0.0).sum(),
        torch.full_like(real.sum(), batch.num_tokens, dtype=torch.float64),
        real.sum(),
        of_candidates.sum(),
    ]
    return torch.stack([total.double() for total in totals])


def extremes(rewards: Tensor, batch: PreferenceBatch) -> Tensor:
    """[2] fp64: minus the lowest and the highest reward of real preferences, -inf without any. Take the highest."""
    values = rewards.detach().double()
    both = torch.stack([-values, values]).masked_fill(~_real_candidates(batch), -torch.inf)
    return both.amax(1)


def finish(totals: Tensor, highest: Tensor) -> dict[str, float]:
    """Totals and extremes over all micro-batches and ranks into means per preference or per candidate."""
    *per_preference, rewards, tokens, preferences, candidates = totals.tolist()
    means = {name: total / preferences for name, total in zip(_PER_PREFERENCE, per_preference, strict=True)}
    lowest, most = highest.tolist()
    own = {"mean_reward": rewards / candidates, "min_reward": -lowest, "max_reward": most, "num_tokens": tokens}
    return means | {name: means[ours] for name, ours in _TRL.items()} | own


def _real_candidates(batch: PreferenceBatch) -> Tensor:
    """[C] bool: the candidates of preferences that are no fillers."""
    return batch.weights[batch.places // batch.mask.shape[1]] > 0
