"""What a recipe would run, found out without starting an actor or loading weights: what all plans have in common."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.weight_sync.manifest import checkpoint_manifest
from raylign.config import OnlineDpoConfig, RunConfig
from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.config.losses import TrainerLoss, loss_functions, members
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.errors import ModelError
from raylign.export.card import loss_name
from raylign.models import context_limit
from raylign.models.load import require_fit
from raylign.models.open import empty_model, open_config
from raylign.reference.checkpoint import resolve_reference
from raylign.report.text import escape_control
from raylign.scoring.locate import locate_function
from raylign.training.logprobs import CompletionLogps
from recipes.commands.checks.ray_cluster import require_named_cluster

THIS_MACHINE = "this machine"


Line = tuple[str, str]


_FP32_BYTES = 4


_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a constant in bitsandbytes' 4-bit storage, and constants that share one of their own."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The policy: where it is, its parameters (those of a tied output head once) and how many of them train."""

    folder: Path
    parameters: int
    trained: int
    context: int


def model_facts(folder: Path, block: ModelBlock) -> ModelFacts:
    """Count the parameters of `block`, whose checked files are in `folder`, by their headers. Raises ModelError."""
    parameters = sum(math.prod(shape) for shape in checkpoint_manifest(folder).values())
    trained = _trained_parameters(folder, block)
    return ModelFacts(folder, parameters, trained, context_limit(str(folder), block.trust_remote_code))


def _trained_parameters(folder: Path, block: ModelBlock) -> int:
    """Parameters with gradients, counted on a model without storage; refuses models that the trainer refuses."""
    trust = block.trust_remote_code
    try:
        with torch.device("meta"):
            model = empty_model(AutoModelForCausalLM, open_config(str(folder), trust), trust)
            CompletionLogps(model)
        if block.lora is not None:
            return adapter_parameters(model, block.lora)
    except ValueError as error:
        raise ModelError(f"{folder}: not a causal language model that can be trained so ({error})") from error
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameters(model: PreTrainedModel, lora: LoraBlock) -> int:
    """Weights of the adapter that PEFT would add: r (inputs + outputs) for each layer it adapts.

    Raises ValueError where PEFT would: no layer of these names, or one that is no linear, Conv1D or embedding layer.
    """
    head = model.get_output_embeddings()
    if lora.target_modules == "all-linear":
        adapted = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    else:
        wanted = lora.target_modules
        adapted = [m for name, m in model.named_modules() if name and name.endswith(tuple(f".{w}" for w in wanted))]
        adapted += [m for name, m in model.named_modules() if name in wanted]
        if not adapted:
            raise ValueError(f"model.lora.target_modules={', '.join(wanted)}: the model has no layer of these names")
        if other := next((m for m in adapted if not isinstance(m, nn.Linear | Conv1D | nn.Embedding)), None):
            raise ValueError(f"model.lora.target_modules: {type(other).__name__} is no layer that LoRA adapts")
    return lora.r * sum(sum(module.weight.shape) for module in adapted)


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
    return math.ceil((parameters - packed) * block.itemsize + packed * (4 + constant) / 8)


def _linear_parameters(folder: Path, block: ModelBlock) -> int:
    """Weights of linear layers but the output head, counted on a model without storage."""
    with torch.device("meta"):
        config = open_config(str(folder), block.trust_remote_code)
        model = empty_model(AutoModelForCausalLM, config, block.trust_remote_code)
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    return sum(module.weight.numel() for module in linear)


def present_resources() -> tuple[str, Mapping[str, float]]:
    """Whose resources they are, and the CPUs and GPUs: of the cluster at RAY_ADDRESS, else of this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return THIS_MACHINE, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    from actors.cluster import cluster  # noqa: PLC0415 - Ray, where there is a cluster to ask

    require_named_cluster()
    with cluster() as available:
        return f"the cluster at {address}", dict(available)


def run_directory(config: RunConfig) -> Path:
    return (config.run.dir / config.run.name).absolute()


def grid(lines: Iterable[Line]) -> Table:
    """`name value` lines, the names in bold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=13)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(escape_control(value)))
    return table


def many(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def loss_lines(loss: TrainerLoss) -> list[Line]:
    """The loss, and of a user's function where it stands and its hash. Raises ScorerError when it cannot be found."""
    lines = [("loss", " + ".join(loss_name(block) for block in members(loss)))]
    for function in loss_functions(loss):
        info = locate_function(function, option="loss.function")
        lines += [("", f"{function}: {info.file}:{info.line}"), ("", f"sha256 {info.sha256}")]
    return lines
