"""TRL's metric names, as sums that add up over micro-batches and ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raylign.losses import LossOutput
from raylign.losses.inputs import ends
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import PreferenceBatch, placed

_PER_PREFERENCE = ("loss", "logps/chosen")
_PER_PAIR = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/rejected")
_PER_TOKEN = ("entropy", "mean_token_accuracy")
_OF_PAIRS = (*_PER_PAIR, "logits/rejected")
NAMES = (*_PER_PREFERENCE, *_PER_PAIR, *_PER_TOKEN, "logits/chosen", "logits/rejected", "num_tokens")
_COUNTS = ("preferences", "pairs", "tokens", "chosen_tokens", "rejected_tokens")


def sums(loss: LossOutput, scores: CompletionScores, batch: PreferenceBatch) -> Tensor:
    """One micro-batch's totals, fp64, where the batch is; fillers (weight 0) add nothing. Add them up, then `finish`.

    Nothing here asks a GPU for a value or for a size: that would wait for all the work before it.
    "chosen" is the best candidate of a preference and "rejected" the worst. A preference of one candidate has neither
    "rejected" nor "rewards". The loss's own metrics come last, by name. Weights of preferences count in the loss alone.
    """
    real, tokens = (batch.weights > 0).float(), scores.tokens
    size = batch.mask.shape[1]
    group, rank = batch.places // size, batch.places % size
    chosen, rejected = rank == 0, rank == (batch.mask.sum(1) - 1)[group]
    pairs = real * (batch.mask.sum(1) > 1)
    chosen_logps, rejected_logps = ends(placed(batch, scores.logps.detach()), batch.mask)
    per_pair = [
        loss.chosen_rewards,
        loss.rejected_rewards,
        loss.chosen_rewards - loss.rejected_rewards,
        (loss.chosen_rewards > loss.rejected_rewards).float(),
        rejected_logps,
    ]
    of_tokens = real[group][scores.owners]
    of_chosen, of_rejected = of_tokens * chosen[scores.owners], (pairs[group] * rejected)[scores.owners]
    totals = [(loss.losses.detach() * batch.weights).sum(), (chosen_logps * real).sum()]
    totals += [(value * pairs).sum() for value in per_pair]
    totals += [(tokens.entropies.detach() * of_tokens).sum(), (tokens.correct * of_tokens).sum()]
    totals += [(tokens.mean_logits * of_chosen).sum(), (tokens.mean_logits * of_rejected).sum()]
    totals += [torch.full_like(real.sum(), batch.num_tokens, dtype=torch.float64), real.sum(), pairs.sum()]
    totals += [of_tokens.sum(), of_chosen.sum(), of_rejected.sum()]
    totals += [(loss.metrics[name] * real).sum() for name in sorted(loss.metrics)]
    return torch.stack([total.double() for total in totals])


def finish(totals: Tensor, own: Sequence[str] = ()) -> dict[str, float]:
    """Totals over all micro-batches and ranks into means per preference or per token; `own` are the loss's metrics.

    What only two candidates can have is left out when no preference had two.
    """
    values = dict(zip((*NAMES, *_COUNTS, *sorted(own)), totals.tolist(), strict=True))
    divisors = dict.fromkeys((*_PER_PREFERENCE, *own), values["preferences"])
    divisors |= dict.fromkeys(_PER_PAIR, values["pairs"]) | dict.fromkeys(_PER_TOKEN, values["tokens"])
    divisors |= {"logits/chosen": values["chosen_tokens"], "logits/rejected": values["rejected_tokens"]}
    left_out = () if values["pairs"] else _OF_PAIRS
    means = {name: values[name] / max(divisor, 1.0) for name, divisor in divisors.items() if name not in left_out}
    return means | {"num_tokens": values["num_tokens"]}
