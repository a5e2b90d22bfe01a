"""Folders to reward models: sequence classifiers with one output."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.models.load import adapter_config, adapter_seed, load_whole, require_fit
from raylign.models.open import read_config, without_dropout
from raylign.training.rewards import score_head
from raylign.training.weights import Gather

if TYPE_CHECKING:
    from peft import PeftModel

_HEAD = "score"
HEAD_WEIGHT = f"{_HEAD}.weight"


def require_reward_fit(folder: str, trust_remote_code: bool) -> None:
    """Raises ModelError unless `load_reward_model` finds the weights it needs in the files; none are read."""
    require_fit(folder, trust_remote_code, AutoModelForSequenceClassification, (HEAD_WEIGHT,))


def load_reward_model(folder: str, block: ModelBlock, seed: int, writable: Gather) -> "PreTrainedModel | PeftModel":
    """The model of `folder` with a score head, in `block.dtype`, every dropout 0, with a fresh adapter if `block.lora`.

    `folder` is a causal language model, whose head is drawn from N(0, 1 / (d + 1)) for hidden states of size d
    (Stiennon et al. 2020, arXiv 2009.01325), or a reward model, whose head is kept. The whole head is trained, beside
    an adapter too. What is drawn depends on `seed` alone; `writable` makes sharded weights whole, and lasting what is
    written to them. Raises ModelError when weights are missing or of another shape, no module is targeted, or
    transformers has no linear head for the architecture.
    """
    config = without_dropout(read_config(folder, block.trust_remote_code))
    config.num_labels = 1
    opened = load_whole(AutoModelForSequenceClassification, folder, block, config)
    opened.require_fit(folder, heads=(HEAD_WEIGHT,))
    model = opened.model
    head = score_head(model)
    if opened.missing:
        _draw(head, seed, writable)
    return model if block.lora is None else _with_adapter(model, block.lora, seed)


def _draw(head: nn.Linear, seed: int, writable: Gather) -> None:
    values = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), writable(list(head.parameters())):
        head.weight.copy_(values * (head.in_features + 1) ** -0.5)


def _with_adapter(model: PreTrainedModel, block: LoraBlock, seed: int) -> "PeftModel":
    """PEFT would train a copy of the head beside the head; here the head itself is trained."""
    from peft import PeftModel  # noqa: PLC0415 - takes seconds, and full fine-tuning does without

    config = adapter_config(model, block, "SEQ_CLS")
    with adapter_seed(seed):
        adapted = PeftModel(model, config, autocast_adapter_dtype=False)
    score_head(model).requires_grad_(True)
    # Whoever loads the adapter must look for the head in its file.
    config.modules_to_save = [_HEAD]
    config.base_model_name_or_path = model.name_or_path
    return adapted
