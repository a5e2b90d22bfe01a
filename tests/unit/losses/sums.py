"""Candidates by their sums, which is how equations are written; the trainer's input has them token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from raylign import losses
from raylign.config.losses import LossBlock
from raylign.losses import LossInput, LossOutput, LossState, TokenLogps


@dataclass(frozen=True, slots=True)
class CandidateLogps:
    """The sums that `LossInput` has, [G, K] each but `kl_logratios` [G]; values beside `mask` may be anything."""

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    scores: Tensor
    mask: Tensor
    entropies: Tensor
    certainty: Tensor
    from_reference: Tensor
    kl_logratios: Tensor

    def by_token(self) -> LossInput:
        """The same in tokens: the first one of a completion has all of its sum, which adds up without rounding."""
        lengths = torch.where(self.mask, self.lengths, 0).long().flatten()
        owners = torch.arange(len(lengths)).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths)[lengths > 0]

        def spread(sums: Tensor) -> Tensor:
            return torch.zeros(len(owners), dtype=sums.dtype).index_put((first,), sums.flatten()[lengths > 0])

        tokens = TokenLogps(
            policy=spread(self.policy),
            owners=owners,
            entropies=spread(self.entropies * self.lengths),
            certainty=spread(self.certainty * self.lengths),
        )
        return LossInput(
            tokens, self.reference, self.lengths, self.scores, self.mask, self.from_reference, self.kl_logratios
        )


def preference_loss(logps: CandidateLogps, block: LossBlock, state: LossState) -> LossOutput:
    return losses.preference_loss(logps.by_token(), block, state)
