"""Completion log-probabilities of a causal language model; the one place with the label shift."""

from collections.abc import Sequence
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raylign.errors import ModelError
from raylign.training.backbone import PaddedAttention, inner_model, last_hidden_states, use_lean_layers
from raylign.training.kernels.head import TokenScores, linear_scores
from raylign.training.sequences import TokenBatch

_LOGIT_RESCALING = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)


class CompletionScores(NamedTuple):
    """What a forward pass says of C completions with N tokens in all.

    `tokens` are the scores of every completion token, `owners` [N] the completion of each. `logps` [C] fp32 is the
    (weighted) sum of token log-probabilities per completion (nats), with gradients. A named tuple, because ZeRO-3 looks
    for tensors in those.
    """

    logps: Tensor
    tokens: TokenScores
    owners: Tensor


class CompletionLogps(nn.Module):
    """Wraps a policy so that one call gives completion log-probs; DeepSpeed's engine wraps this module.

    Only positions that predict completion tokens reach the output head, and no [N, V] logits are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.padded_attention: PaddedAttention = "sdpa"
        causal = inner_model(model)
        _require_plain_head(causal)
        use_lean_layers(causal)
        # Called as a module, so that ZeRO-3 gathers its weight.
        head = causal.get_output_embeddings()
        head.forward = MethodType(_score_labels, head)

    def forward(self, batch: TokenBatch, token_weights: Tensor | None = None) -> CompletionScores:
        """Scores of `batch`; `token_weights` [N] scale each token's share of its completion's sum (1 when None)."""
        causal = inner_model(self.model)
        hidden = last_hidden_states(causal, batch, self.padded_attention)[batch.predictors]
        tokens: TokenScores = causal.get_output_embeddings()(hidden, batch.labels)
        shares = tokens.logps if token_weights is None else tokens.logps * token_weights
        logps = torch.zeros(batch.completions, device=hidden.device).index_add(0, batch.owners, shares)
        return CompletionScores(logps, tokens, batch.owners)

    def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
        """Log-probs of a completion's tokens from the logits of one row, for the check against transformers."""
        logits = inner_model(self.model)(input_ids=torch.tensor([[*prompt, *completion]], device=device)).logits[0]
        labels = torch.tensor(completion, device=device)[:, None]
        logps: Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, labels)[:, 0]
        return logps


def _score_labels(head: nn.Linear, hidden: Tensor, labels: Tensor) -> TokenScores:
    return linear_scores(hidden, head.weight, head.bias, labels)


def _require_plain_head(causal: PreTrainedModel) -> None:
    """Anything but a linear layer would need its own projection; refuse rather than train on wrong log-probs."""
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the output head of {causal.config.model_type!r} is a {type(head).__name__}, not a linear layer; "
            "leave it out of model.lora.target_modules, or use another model"
        )
    _require_no_rescaling(causal.config)


def _require_no_rescaling(config: PretrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        values = part.to_dict()
        for option in _LOGIT_RESCALING:
            if values.get(option) not in (None, 1, 1.0):
                raise ModelError(
                    f"model type {config.model_type!r} sets {option}={values[option]}, which raylign does not apply; "
                    "use a model without logit rescaling"
                )
