"""Folders to the two language models of an implicit reward."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from raylign.config.scoring import ImplicitScoringBlock
from raylign.errors import ModelError
from raylign.models.load import load_whole, read_config, without_dropout
from raylign.reference.checkpoint import require_same_vocabulary
from raylign.scoring.checkpoints import PLAIN, ScorerCheckpoint, adapted, find_checkpoint, model_block

_TASK = "CAUSAL_LM"


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Where both models are, and what their config.json say."""

    policy: ScorerCheckpoint
    reference: ScorerCheckpoint
    configs: tuple[PreTrainedConfig, PreTrainedConfig]


def find_pair(block: ImplicitScoringBlock) -> ModelPair:
    """Find both; no weights are read but their headers.

    Raises ModelError: nothing there, no language model, or the reference reads other tokens than the policy.
    """
    policy = find_checkpoint(block.policy_path, block.policy_revision, _TASK, "scoring.policy")
    reference = find_checkpoint(block.reference_path, block.reference_revision, _TASK, "scoring.reference")
    configs = (_config(policy, block), _config(reference, block))
    if policy.base != reference.base:
        require_same_vocabulary(policy.base, reference.base, block.trust_remote_code)
    return ModelPair(policy, reference, configs)


def _config(checkpoint: ScorerCheckpoint, block: ImplicitScoringBlock) -> PreTrainedConfig:
    config = read_config(checkpoint.base, block.trust_remote_code, PLAIN)
    names = config.architectures or []
    if any(name.endswith("Classification") for name in names):
        raise ModelError(
            f"{checkpoint.base} is a {', '.join(names)}, not a language model; take scoring.type=reward_model for it"
        )
    return config


def load_language_model(checkpoint: ScorerCheckpoint, block: ImplicitScoringBlock, device: torch.device) -> nn.Module:
    """The model in `block.dtype` on `device`, to be evaluated, an adapter unmerged as in the trainer.

    Raises ModelError when a weight is in no file, or an adapter's weight has no place.
    """
    config = without_dropout(_config(checkpoint, block))
    opened = load_whole(AutoModelForCausalLM, checkpoint.base, model_block(block), config)
    opened.require_fit(checkpoint.base)
    model: nn.Module = opened.model
    for adapter in checkpoint.adapters:
        model = adapted(opened.model, adapter)
    return model.to(device).eval()
