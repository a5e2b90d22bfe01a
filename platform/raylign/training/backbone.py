"""The transformers model behind both heads, and its hidden states over a packed or padded batch."""

from torch import Tensor, nn
from transformers import PreTrainedModel

import raylign.training.attention as attention
from raylign.training.adapted_linear import use_fused_adapters
from raylign.training.rms_norm import use_lean_norms
from raylign.training.sequences import TokenBatch


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or itself."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def use_lean_layers(inner: PreTrainedModel) -> None:
    """Norms and adapters that compute the same in fewer passes over memory."""
    use_lean_norms(inner)
    use_fused_adapters(inner)


def last_hidden_states(inner: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[R * T, H]: the last hidden state at every flat position of `batch`, after the final norm."""
    packed = bool(batch.segments)
    decoder = inner.get_decoder()
    # A classifier's decoder has a config of its own.
    for config in (inner.config, decoder.config):
        config._attn_implementation = attention.PACKED if packed else "sdpa"
    options = {"segments": batch.segments} if packed else {"attention_mask": batch.attention_mask}
    output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)
