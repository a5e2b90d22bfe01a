"""What the reference of a run is, and the memory it takes beside the policy."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from actors.weight_sync.manifest import checkpoint_manifest
from raylign.config import OnlineDpoConfig
from raylign.config.blocks import ModelBlock
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.models import DTYPES
from raylign.models.load import require_fit
from raylign.models.open import empty_model, open_config
from raylign.reference.checkpoint import resolve_reference

_FP32_BYTES = 4
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a constant in bitsandbytes' 4-bit storage, and constants that share one of their own."""


@dataclass(frozen=True, slots=True)
class ReferenceFacts:
    """What the reference is, in words, and the bytes that every trainer rank holds for it."""

    what: str
    bytes_per_rank: int


def reference_facts(config: OnlineDpoConfig, folder: Path, trained: int) -> ReferenceFacts:
    """`folder` is the policy's and `trained` its parameters with gradients. Raises ModelError as a run would."""
    reference, adapter = config.reference, config.model.lora is not None
    found = resolve_reference(reference, config.model, str(folder))
    if found != str(folder):
        require_fit(found, config.model.trust_remote_code)
    whole = stored_bytes(Path(found), config.model)
    shards = config.trainer.ranks if config.trainer.zero_stage == 3 else 1
    copy, mix = math.ceil(whole / shards), math.ceil(trained * _FP32_BYTES / shards)
    followed = trained * _FP32_BYTES if adapter else copy
    match reference:
        case InitialReferenceBlock():
            what = "the policy without its adapter" if adapter else "a frozen copy of the model before round 1"
            return ReferenceFacts(what, 0 if adapter else copy)
        case PreviousRoundReferenceBlock():
            return ReferenceFacts("the policy at the start of each round", followed)
        case EveryReferenceBlock():
            return ReferenceFacts(f"the policy of up to {reference.n} rounds ago, renewed that often", followed)
        case EmaReferenceBlock():
            what = f"a moving average that takes {reference.alpha:g} of the policy after every round"
            return ReferenceFacts(what, followed + (0 if adapter else mix))
        case ModelReferenceBlock():
            return ReferenceFacts(f"{reference.path}, frozen", copy)
        case SamplerReferenceBlock():
            return ReferenceFacts("the sampling policy, by the log-probs it sampled with", 0)
        case NoReferenceBlock():
            return ReferenceFacts("none", 0)


def stored_bytes(folder: Path, block: ModelBlock) -> int:
    """Bytes of the frozen model of `folder` as a trainer holds it, in `block.dtype` and 4 bits as `block` says."""
    parameters = sum(math.prod(shape) for shape in checkpoint_manifest(folder).values())
    packed = _linear_parameters(folder, block) if block.load_in_4bit else 0
    constant = 8 / _BLOCK + 32 / (_BLOCK * _NESTED_BLOCK) if block.use_bnb_nested_quant else 32 / _BLOCK
    return math.ceil((parameters - packed) * DTYPES[block.dtype].itemsize + packed * (4 + constant) / 8)


def _linear_parameters(folder: Path, block: ModelBlock) -> int:
    """Weights of linear layers but the output head, counted on a model without storage."""
    with torch.device("meta"):
        config = open_config(str(folder), block.trust_remote_code)
        model = empty_model(AutoModelForCausalLM, config, block.trust_remote_code)
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    return sum(module.weight.numel() for module in linear)
