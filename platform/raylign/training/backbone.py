"""The transformers model behind both heads, and its hidden states over a packed or padded batch."""

from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import raylign.training.kernels.attention as attention
from raylign.errors import ModelError
from raylign.models.open import switch_length
from raylign.training.kernels.adapted_linear import use_fused_adapters
from raylign.training.kernels.rms_norm import use_lean_norms
from raylign.training.sequences import TokenBatch

PaddedAttention = Literal["sdpa", "eager"]
"""Of transformers' own, which one padded rows take: PyTorch's leaves out what it does not know, like soft-capping."""


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or itself."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def use_lean_layers(inner: PreTrainedModel) -> None:
    """Norms and adapters that compute the same in fewer passes over memory."""
    use_lean_norms(inner)
    use_fused_adapters(inner)


def last_hidden_states(inner: PreTrainedModel, batch: TokenBatch, padded_attention: PaddedAttention) -> Tensor:
    """[R * T, H]: the last hidden state at every flat position of `batch`, after the final norm."""
    _require_one_rope(inner.config, batch)
    packed = bool(batch.segments)
    decoder = inner.get_decoder()
    # A classifier's decoder has a config of its own.
    for config in (inner.config, decoder.config):
        config._attn_implementation = attention.PACKED if packed else padded_attention
    options: dict[str, Any] = {"segments": batch.segments} if packed else {"attention_mask": batch.attention_mask}
    # Models without such an option count the positions of padded rows by themselves, or know none.
    if packed or "position_ids" in signature(decoder.forward).parameters:
        options["position_ids"] = batch.position_ids
    output = decoder(input_ids=batch.input_ids, use_cache=False, **options)
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)


def _require_one_rope(config: PreTrainedConfig, batch: TokenBatch) -> None:
    """Raises ModelError for sequences that would change the rotary frequencies of their neighbours."""
    limit = switch_length(config)
    longest = max((part.prompt + max(part.completions, default=0) for part in batch.segments), default=0)
    if limit is not None and max(longest, batch.input_ids.shape[1] * (not batch.segments)) > limit:
        raise ModelError(
            f"a sequence is longer than the {limit} tokens up to which {config.model_type!r} keeps its rotary "
            "frequencies, and would change those of its whole batch; shorten it"
        )
