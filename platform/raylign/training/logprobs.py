"""Completion log-probabilities of a causal language model; the one place with the label shift."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raylign.errors import ModelError
from raylign.training.batches import Sequences

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
    """What a forward pass says of S completions with N tokens in all.

    `logps` [S] fp32: summed log-probability per row (nats), with gradients. Detached: `token_logps` [N] in row-major
    order, `entropies` [N] (nats), `correct` [N] (the greedy token was the target), `mean_logits` [N] (over the
    vocabulary), `rows` [N] (the row of each token). A named tuple, because ZeRO-3 looks for tensors in those.
    """

    logps: Tensor
    token_logps: Tensor
    entropies: Tensor
    correct: Tensor
    mean_logits: Tensor
    rows: Tensor


class CompletionLogps(nn.Module):
    """Wraps a policy so that one call gives completion log-probs; DeepSpeed's engine wraps this module.

    Hidden states are gathered at the positions that predict completion tokens before the output head runs, so
    prompt and padding positions are never projected to the vocabulary. Log-softmax is fp32.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        _require_plain_head(self._causal_lm().config)

    def _causal_lm(self) -> PreTrainedModel:
        model = self.model
        causal = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
        assert isinstance(causal, PreTrainedModel)
        return causal

    def forward(self, sequences: Sequences) -> CompletionScores:
        causal = self._causal_lm()
        decoder, head = causal.get_decoder(), causal.get_output_embeddings()
        output = decoder(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False)
        targets = sequences.targets[:, 1:]
        hidden = output.last_hidden_state[:, :-1][targets]
        logits = head(hidden).float()
        log_softmax = logits.log_softmax(-1)
        labels = sequences.input_ids[:, 1:][targets]
        token_logps = log_softmax.gather(-1, labels[:, None]).squeeze(-1)
        rows = targets.nonzero()[:, 0]
        logps = torch.zeros(targets.shape[0], device=rows.device).index_add(0, rows, token_logps)
        with torch.no_grad():
            entropies = -(log_softmax.exp() * log_softmax).sum(-1)
            correct = logits.argmax(-1) == labels
            return CompletionScores(logps, token_logps.detach(), entropies, correct, logits.mean(-1), rows)


def _require_plain_head(config: PretrainedConfig) -> None:
    """Heads that rescale logits need their own projection; refuse rather than train on wrong log-probs."""
    for part in (config, config.get_text_config()):
        values = part.to_dict()
        for option in _LOGIT_RESCALING:
            if values.get(option) not in (None, 1, 1.0):
                raise ModelError(
                    f"model type {config.model_type!r} sets {option}={values[option]}, which raylign does not apply; "
                    "use a model without logit rescaling"
                )
