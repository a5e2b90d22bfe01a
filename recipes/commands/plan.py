"""What a recipe would run, found out without starting an actor or loading weights."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from actors.cluster import cluster
from actors.placement import PlacementPlan, choose_device, plan_placement, require_resources
from actors.weight_sync.folder import shared_folder
from actors.weight_sync.manifest import checkpoint_manifest
from actors.weight_sync.transports import Transport, choose_transport, require_room
from raylign.config import OnlineDpoConfig, RunConfig
from raylign.config.blocks import ModelBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.errors import ModelError
from raylign.models import DTYPES, context_limit, load_tokenizer, require_context, resolve_model
from raylign.models.load import require_fit
from raylign.models.open import empty_model, open_config
from raylign.models.reward_model import require_reward_fit
from raylign.prompts import PromptSet, draw, left_out, load_prompts
from raylign.reference.checkpoint import resolve_reference
from raylign.scoring import require_references
from raylign.scoring.describe import describe_scorer
from raylign.training.logprobs import CompletionLogps
from raylign.training.schedule import steps_per_round
from recipes.commands.checks.ray_cluster import require_named_cluster
from recipes.commands.plan_reference import ReferenceFacts, reference_facts

THIS_MACHINE = "this machine"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The policy: where it is, its parameters (those of a tied output head once) and how many of them train."""

    folder: Path
    parameters: int
    trained: int
    context: int


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """Counts of the two parts, and the shortest, median and longest prompt of both, in tokens.

    `left_out` says which bad rows the run would go without; empty when it takes all.
    """

    train: int
    held_out: int
    shortest: int
    middle: float
    longest: int
    left_out: str


@dataclass(frozen=True, slots=True)
class Amounts:
    """Upper bounds of work: every completion as long as allowed, every prompt giving a preference."""

    sampled_per_round: int
    evaluated_per_round: int
    sampled: int
    evaluated: int
    steps_per_round: int
    steps: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that `raylign plan` shows. Made by `make_plan`, read by `recipes.commands.plan_view`.

    `scorer` is its name, then facts about it. `push_bytes` is the size of one weight file in shared memory, 0 for
    transports without one; `free_bytes` is the room for it, 0 when that is on another machine.
    """

    config: OnlineDpoConfig
    model: ModelFacts
    reference: ReferenceFacts
    prompts: PromptFacts
    scorer: tuple[str, ...]
    amounts: Amounts
    placement: PlacementPlan
    available: Mapping[str, float]
    cluster: str
    transport: Transport
    push_bytes: int
    free_bytes: int


def make_plan(config: OnlineDpoConfig) -> RunPlan:
    """Check what a run would check before and right after its start. Raises RaylignError, naming the cure."""
    scorer = describe_scorer(config.scoring, load=False)
    model = model_facts(config.model)
    for read in (str(model.folder), resolve_reference(config.reference, config.model, str(model.folder))):
        require_context("generators.max_model_len", config.generators.max_model_len, read, config.model)
    reference = reference_facts(config, model.folder, model.trained)
    tokenizer = load_tokenizer(str(model.folder), config.model.trust_remote_code, config.model.chat_template)
    prompts = load_prompts(config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed)
    draw(prompts.train, 1, config.schedule.prompts_per_round, config.run.seed)
    require_references((*prompts.train, *prompts.held_out), config.scoring)
    where, available = present_resources()
    placement = plan_placement(
        config.placement, config.generators, config.trainer, choose_device(config.placement, available)
    )
    require_resources(placement, available)
    transport = choose_transport(
        config.generators.weight_sync.transport,
        device=placement.device,
        adapter=config.model.adapter_fits_checkpoint,
        own_devices=config.placement.mode == "disaggregated",
        keeps_base=config.sampling.reference_generations > 0,
    )
    push = model.parameters * DTYPES[config.model.dtype].itemsize if transport == "shm" else 0
    is_here = where == THIS_MACHINE
    if is_here:
        require_room(shared_folder(), push)
    return RunPlan(
        config=config,
        model=model,
        reference=reference,
        prompts=prompt_facts(prompts),
        scorer=scorer,
        amounts=amounts(config, len(prompts.held_out)),
        placement=placement,
        available=available,
        cluster=where,
        transport=transport,
        push_bytes=push,
        free_bytes=shutil.disk_usage(shared_folder()).free if is_here else 0,
    )


def model_facts(block: ModelBlock, *, rewards: bool = False) -> ModelFacts:
    """Resolve the path (a hub id is downloaded) and count parameters by the headers of the files.

    Raises ModelError when these are not of the policy, or for `rewards` the reward model, that config.json describes.
    """
    folder = Path(resolve_model(block.path, block.revision))
    (require_reward_fit if rewards else require_fit)(str(folder), block.trust_remote_code)
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
            trained: nn.Module = model
            if block.lora is not None:
                targets = block.lora.target_modules
                wanted = targets if isinstance(targets, str) else list(targets)
                trained = get_peft_model(
                    model, LoraConfig(task_type="CAUSAL_LM", r=block.lora.r, target_modules=wanted)
                )
    except ValueError as error:
        raise ModelError(f"{folder}: not a causal language model that can be trained so ({error})") from error
    return sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)


def prompt_facts(prompts: PromptSet) -> PromptFacts:
    lengths = [len(prompt.token_ids) for prompt in (*prompts.train, *prompts.held_out)]
    return PromptFacts(
        train=len(prompts.train),
        held_out=len(prompts.held_out),
        shortest=min(lengths),
        middle=median(lengths),
        longest=max(lengths),
        left_out=left_out(prompts.invalid),
    )


def amounts(config: OnlineDpoConfig, held_out: int) -> Amounts:
    """Evaluation runs before round 1 and after each of the `schedule.rounds` rounds."""
    schedule, sampling = config.schedule, config.sampling
    per_round = schedule.prompts_per_round * sampling.max_generations * sampling.max_new_tokens
    steps = steps_per_round(config.max_preferences_per_round, config.trainer)
    evaluated = held_out * config.evaluation.num_generations * sampling.max_new_tokens
    return Amounts(
        sampled_per_round=per_round,
        evaluated_per_round=evaluated,
        sampled=schedule.rounds * per_round,
        evaluated=(schedule.rounds + 1) * evaluated,
        steps_per_round=steps,
        steps=schedule.rounds * steps,
    )


def present_resources() -> tuple[str, Mapping[str, float]]:
    """Whose resources they are, and the CPUs and GPUs: of the cluster at RAY_ADDRESS, else of this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return THIS_MACHINE, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    require_named_cluster()
    with cluster() as available:
        return f"the cluster at {address}", dict(available)


def notes(plan: RunPlan) -> list[str]:
    """What is no error, but may not be meant."""
    config, found = plan.config, []
    run = run_directory(config)
    if plan.prompts.left_out:
        found.append(plan.prompts.left_out)
    if run.exists():
        found.append(f"{run} exists already: `raylign run` needs another run.name, or that folder gone")
    if config.trainer.train_batch_size > config.max_preferences_per_round:
        found.append(
            f"a step takes {config.trainer.train_batch_size} preferences, a round gives at most "
            f"{config.max_preferences_per_round}: every step will be smaller"
        )
    if config.model.lora is None and not isinstance(config.reference, InitialReferenceBlock):
        found.append(
            f"reference.policy={config.reference.policy} without an adapter keeps no copy of the initial policy: how "
            "far the policy has moved from it is not told"
        )
    passes = config.schedule.rounds * config.schedule.prompts_per_round / plan.prompts.train
    if passes > 1:
        found.append(f"the rounds use each of the {plan.prompts.train} training prompts {passes:.1f} times")
    return found


def run_directory(config: RunConfig) -> Path:
    return (config.run.dir / config.run.name).absolute()
