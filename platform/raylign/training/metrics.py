"""TRL's metric names, as sums that add up over micro-batches and ranks."""

import torch
from torch import Tensor

from raylign.losses import LossOutput
from raylign.training.logprobs import CompletionScores

_PER_PREFERENCE = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
_PER_TOKEN = ("entropy", "mean_token_accuracy")
NAMES = (*_PER_PREFERENCE, *_PER_TOKEN, "logits/chosen", "logits/rejected", "num_tokens")
_COUNTS = ("preferences", "tokens", "chosen_tokens", "rejected_tokens")


def sums(loss: LossOutput, scores: CompletionScores, weights: Tensor, input_tokens: int) -> Tensor:
    """One micro-batch's totals [len(NAMES) + 4], fp64; fillers (weight 0) add nothing. Add them, then `finish`."""
    pairs = weights.shape[0]
    chosen, rejected = loss.chosen_rewards, loss.rejected_rewards
    per_preference = [
        loss.losses.detach(),
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).float(),
        scores.logps[:pairs].detach(),
        scores.logps[pairs:].detach(),
    ]
    token_weights = weights.repeat(2)[scores.rows]
    is_chosen = token_weights * (scores.rows < pairs)
    is_rejected = token_weights - is_chosen
    real = float(weights.sum() > 0)
    totals = [(value * weights).sum() for value in per_preference]
    totals += [(scores.entropies * token_weights).sum(), (scores.correct * token_weights).sum()]
    totals += [(scores.mean_logits * is_chosen).sum(), (scores.mean_logits * is_rejected).sum()]
    totals += [torch.tensor(input_tokens * real), weights.sum()]
    totals += [token_weights.sum(), is_chosen.sum(), is_rejected.sum()]
    return torch.stack([total.double().cpu() for total in totals])


def finish(totals: Tensor) -> dict[str, float]:
    """Totals over all micro-batches and ranks into means per preference or per token."""
    values = dict(zip((*NAMES, *_COUNTS), totals.tolist(), strict=True))
    divisors = dict.fromkeys(_PER_PREFERENCE, values["preferences"]) | dict.fromkeys(_PER_TOKEN, values["tokens"])
    divisors |= {"logits/chosen": values["chosen_tokens"], "logits/rejected": values["rejected_tokens"]}
    means = {name: values[name] / max(divisor, 1.0) for name, divisor in divisors.items()}
    return means | {"num_tokens": values["num_tokens"]}
