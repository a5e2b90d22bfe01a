"""Scorers' models: loaded, and without that as people read them and as kept scores know them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from raylign.config.scoring import ImplicitScoringBlock, ModelScoringBlock, RewardModelScoringBlock
from raylign.models import load_tokenizer
from raylign.run.fingerprints import fingerprint
from raylign.scoring.base import Compute, ItemScorer
from raylign.scoring.checkpoints import ScorerCheckpoint, model_fingerprint, of_scorer
from raylign.scoring.implicit import ImplicitScorer
from raylign.scoring.implicit_checkpoints import find_pair
from raylign.scoring.reward_checkpoint import architecture, find_reward_model, load_reward_tokenizer
from raylign.scoring.reward_model import RewardModelScorer


def load_model(block: RewardModelScoringBlock | ImplicitScoringBlock, compute: Compute) -> ItemScorer:
    """The scorer, loaded; this process computes on so many threads from here on. Raises ScorerError."""
    torch.set_num_threads(compute.threads)
    device = torch.device("cuda", 0) if compute.on_gpu else torch.device("cpu")
    match block:
        case RewardModelScoringBlock():
            return RewardModelScorer(block, device)
        case ImplicitScoringBlock():
            return ImplicitScorer(block, device)


def describe_reward_model(block: RewardModelScoringBlock) -> tuple[str, ...]:
    """Facts, one a line. Raises ScorerError for what would stop the scorer before its weights are read."""
    with of_scorer():
        checkpoint, config = find_reward_model(block)
        tokenizer = load_reward_tokenizer(checkpoint, block)
        facts = (
            f"{architecture(checkpoint, config)}, {_size(checkpoint, block)}, in {_places(checkpoint)}",
            f"sha256 {model_fingerprint(checkpoint)} of its files",
            _template(block, checkpoint),
        )
    pad = tokenizer.pad_token_id if checkpoint.adapters else config.get_text_config().pad_token_id
    if pad is not None and pad == tokenizer.eos_token_id:
        return (*facts, "its pad token is its end token: rewards are read before that, as transformers does")
    return facts


def describe_implicit(block: ImplicitScoringBlock) -> tuple[str, ...]:
    """Facts, one a line. Raises ScorerError for what would stop the scorer before its weights are read."""
    with of_scorer():
        pair = find_pair(block)
        load_tokenizer(pair.policy.tokenizer, block.trust_remote_code, block.chat_template)
        lines: list[str] = []
        for name, checkpoint in (("policy", pair.policy), ("reference", pair.reference)):
            lines.append(f"{name}: {_size(checkpoint, block)}, in {_places(checkpoint)}")
            lines.append(f"sha256 {model_fingerprint(checkpoint)} of its files")
    how = "per token" if block.length_normalised else "summed over tokens"
    return (f"beta {block.beta:g}, {how}", *lines, _template(block, pair.policy))


def model_hashes(block: ModelScoringBlock) -> list[str]:
    """Hashes (sha256, hex) of all that decides a score: each model's files, and the template of `block`.

    Raises ScorerError when a model is not there.
    """
    with of_scorer():
        hashes = [model_fingerprint(checkpoint) for checkpoint in _checkpoints(block)]
    template = block.chat_template
    return hashes if template is None else [*hashes, fingerprint(template).sha256]


def _checkpoints(block: ModelScoringBlock) -> Iterator[ScorerCheckpoint]:
    match block:
        case RewardModelScoringBlock():
            yield find_reward_model(block)[0]
        case ImplicitScoringBlock():
            pair = find_pair(block)
            yield from (pair.policy, pair.reference)


def _size(checkpoint: ScorerCheckpoint, block: ModelScoringBlock) -> str:
    return f"{checkpoint.parameters():,} parameters in {block.dtype}"


def _places(checkpoint: ScorerCheckpoint) -> str:
    return " on ".join(str(folder) for folder in reversed(checkpoint.folders))


def _template(block: ModelScoringBlock, checkpoint: ScorerCheckpoint) -> str:
    source = f"in {checkpoint.tokenizer}" if block.chat_template is None else f"file {Path(block.chat_template)}"
    return f"chat template {source}"
