"""Forward passes without gradients: log-probs of rows, and the KL of a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylign.chunks import chunks
from raylign.records import Completions, Preference
from raylign.training.batches import MicroBatch
from raylign.training.preferences import kl_completions, kl_reference_logps
from raylign.training.sequences import Layout, token_batch


@dataclass(frozen=True, slots=True)
class Passes:
    """How this rank lays sequences out. A `module` maps a `TokenBatch` to `CompletionScores`."""

    layout: Layout
    pad_id: int
    device: torch.device

    def logps(self, module: nn.Module, rows: Sequence[Completions], count: int, batch: int) -> list[list[float]]:
        """Summed log-probs of the completions of `rows`.

        Every rank runs `count` rows, `batch` at a time with fillers, so that ZeRO-3 gathers line up.
        """
        filled = [*rows, *[rows[-1] if rows else Completions((0,), ((0,),))] * (count - len(rows))]
        found = iter([logp for group in chunks(filled, batch) for logp in self._summed(module, group).tolist()])
        return [[next(found) for _ in row.completions] for row in rows]

    def kl_logps(self, module: nn.Module, preferences: Sequence[Preference]) -> Tensor:
        """[G] summed log-probs of the KL samples of `preferences`."""
        return self._summed(module, [kl_completions(preference) for preference in preferences])

    def kl_totals(
        self, module: nn.Module, preferences: Sequence[Preference], micro_batches: Iterable[MicroBatch]
    ) -> Tensor:
        """[2] fp64: the sum of log pi - log pi_ref over the KL samples of the micro-batches, and how many they are.

        `module` is the policy. Fillers count nothing.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in micro_batches:
            mine = [preferences[index] for index in micro.indices]
            weights = torch.tensor(micro.weights, dtype=torch.float64, device=self.device)
            logratios = (self.kl_logps(module, mine) - kl_reference_logps(mine).to(self.device)).double()
            totals += torch.stack([(logratios * weights).sum(), weights.sum()])
        return totals

    def _summed(self, module: nn.Module, rows: Sequence[Completions]) -> Tensor:
        with torch.no_grad():
            logps: Tensor = module(token_batch(rows, self.layout, self.pad_id).to(self.device)).logps
        return logps
