"""Rewards of completions under a reward model: a linear score of the hidden state at the last token."""

from collections.abc import Sequence
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from raylign.errors import ModelError
from raylign.training.backbone import PaddedAttention, inner_model, last_hidden_states, use_lean_layers
from raylign.training.sequences import TokenBatch


class CompletionRewards(nn.Module):
    """Wraps a sequence classifier so that one call gives completion rewards; DeepSpeed's engine wraps this module.

    The last token is known from the batch, whatever the pad token: transformers looks for the last one that is no
    padding, and would miss an EOS that is also the pad token.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.padded_attention: PaddedAttention = "sdpa"
        inner = inner_model(model)
        head = score_head(inner)
        use_lean_layers(inner)
        # Called as a module, so that ZeRO-3 gathers its weight.
        head.forward = MethodType(_score, head)  # type: ignore[method-assign]

    def forward(self, batch: TokenBatch) -> Tensor:
        """Rewards [C] fp32 of the completions of `batch`, with gradients."""
        inner = inner_model(self.model)
        rewards: Tensor = score_head(inner)(last_hidden_states(inner, batch, self.padded_attention)[batch.ends])
        return rewards

    def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
        """The reward [1] of one row, for the check against transformers."""
        rewards: Tensor = inner_model(self.model)(
            input_ids=torch.tensor([[*prompt, *completion]], device=device)
        ).logits[0]
        return rewards


def score_head(inner: PreTrainedModel) -> nn.Linear:
    """The layer that makes a reward of a hidden state. Raises ModelError when it is not linear or has other outputs."""
    head = getattr(inner, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        found = f"is {head}" if isinstance(head, nn.Module) else "is missing"
        raise ModelError(
            f"the score head of {inner.config.model_type!r} {found}, not a linear layer with one output; use a model "
            "whose sequence classifier in transformers has a linear `score`, with num_labels=1"
        )
    return head


def _score(head: nn.Linear, hidden: Tensor) -> Tensor:
    """In fp32: bfloat16 would round rewards to three digits, and their gaps with them."""
    bias = None if head.bias is None else head.bias.float()
    return linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
