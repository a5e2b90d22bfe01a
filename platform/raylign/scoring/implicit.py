"""Scores from the implicit reward of two language models: beta (log pi - log pi_ref), and where the two are found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from raylign.config.scoring import ImplicitScoringBlock
from raylign.data.examples import Completion, Example
from raylign.data.tokens import Tokenized, tokenized
from raylign.errors import ModelError
from raylign.models import end_ids, load_tokenizer
from raylign.models.load import is_adapted, load_whole
from raylign.models.open import read_config, without_dropout
from raylign.prompts.tables import Fault
from raylign.records import Completions, Score
from raylign.reference.checkpoint import require_same_vocabulary
from raylign.scoring.base import ItemScorer, ScoringItem
from raylign.scoring.checkpoints import (
    PLAIN,
    ScorerCheckpoint,
    adapted,
    device_of,
    find_checkpoint,
    hashes_of,
    model_block,
    model_fingerprint,
    model_input,
    of_scorer,
    places_of,
    size_of,
    template_of,
)
from raylign.scoring.forward import by_length, fault_of, finite, in_batches, length_limit, too_long
from raylign.scoring.kind import Kind, Near
from raylign.training.layout_check import supported_layout
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout, token_batch

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


if TYPE_CHECKING:
    from peft import PeftModel

Ids = tuple[int, ...]
Row = tuple[Ids, Ids]
"""A prompt and a completion of it, in tokens."""
_Module = Callable[[], AbstractContextManager[CompletionLogps]]


class ImplicitScorer:
    """beta (log pi(y|x) - log pi_ref(y|x)), summed over the tokens of y, or their mean where `length_normalised`.

    Log-probs are the trainer's: same packing and fp32 log-softmax, so that with its models and template the score of a
    completion that ended by itself is its `rewards/chosen` or `rewards/rejected`. y is the text as the policy's
    template writes it, up to and with its end token; a completion that was cut gets that too. `parts` has both
    log-probs (`policy_logps`, `reference_logps`, nats) and `tokens`.

    Unscored are completions that are too long, refused by the template, no Unicode, or that write a special token.
    """

    def __init__(self, block: ImplicitScoringBlock, device: torch.device) -> None:
        """Load both models, or one where the reference is the base of the policy's adapter.

        Raises ScorerError: no such model, no language model, weights missing, two vocabularies.
        """
        self._block, self._device = block, device
        with of_scorer():
            pair = find_pair(block)
            self._tokenizer = load_tokenizer(pair.policy.tokenizer, block.trust_remote_code, block.chat_template)
            self._ends = end_ids(self._tokenizer, pair.policy.folders)
            model = load_language_model(pair.policy, block, device)
            self._policy = CompletionLogps(model)
            self._reference = self._reference_of(model, pair)
        self._limit = length_limit(block, pair.configs, block.policy_path)
        self._layout = self._supported_layout()

    def _reference_of(self, model: nn.Module, pair: ModelPair) -> _Module:
        if is_adapted(model) and pair.reference.folders == pair.policy.folders[:1]:
            return partial(_without_adapter, model, self._policy)
        reference = CompletionLogps(load_language_model(pair.reference, self._block, self._device))
        return lambda: nullcontext(reference)

    def _supported_layout(self) -> Layout:
        with self._reference() as reference:
            modules = [self._policy] if reference is self._policy else [self._policy, reference]
        with of_scorer():
            return supported_layout(modules, "shared", self._device)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops once more than `allowed` of `items` are unscored."""
        return in_batches(self._rows(items), self._plan, self._forward, self._block, allowed)

    def _rows(self, items: Sequence[ScoringItem]) -> list[Row | Score]:
        faults = [fault_of(item.completion, self._tokenizer) for item in items]
        sound = (_example(item) for item, fault in zip(items, faults, strict=True) if not fault)
        found = tokenized(sound, self._tokenizer, "demonstrations", None, self._ends)
        return [Score(None, reason=fault) if fault else self._row(next(found)) for fault in faults]

    def _row(self, one: Tokenized | Fault) -> Row | Score:
        if isinstance(one, Fault):
            return Score(None, reason=one.problem)
        (ids,) = one.ids
        if not ids:
            return Score(None, reason="the chat template wrote nothing of it")
        total = len(one.prompt) + len(ids)
        return (one.prompt, ids) if total <= self._limit else too_long(total, self._limit)

    def _plan(self, rows: Mapping[int, Row]) -> list[list[int]]:
        if self._layout == "padded":
            return by_length({index: len(prompt) + len(ids) for index, (prompt, ids) in rows.items()}, self._block)
        return by_prompt(rows, self._block)

    def _forward(self, rows: Sequence[Row]) -> list[Score]:
        groups = [
            Completions(prompt, [ids for _, ids in group]) for prompt, group in groupby(rows, key=lambda row: row[0])
        ]
        batch = token_batch(groups, self._layout, self._tokenizer.pad_token_id).to(self._device)
        policy = self._policy(batch).logps.tolist()
        with self._reference() as module:
            reference = module(batch).logps.tolist()
        lengths = [len(ids) for _, ids in rows]
        return [self._score(*found) for found in zip(policy, reference, lengths, strict=True)]

    def _score(self, policy: float, reference: float, tokens: int) -> Score:
        ratio = self._block.beta * (policy - reference)
        parts = {"policy_logps": policy, "reference_logps": reference, "tokens": float(tokens)}
        return finite(ratio / tokens if self._block.length_normalised else ratio, parts)


@contextmanager
def _without_adapter(model: "PeftModel", module: CompletionLogps) -> Iterator[CompletionLogps]:
    with model.disable_adapter():
        yield module


def _example(item: ScoringItem) -> Example:
    answer = Completion(({"role": "assistant", "content": item.completion},))
    return Example(0, item.prompt.messages, (answer,), ranked=True)


def by_prompt(rows: Mapping[int, Row], block: ImplicitScoringBlock) -> list[list[int]]:
    """Batches of indices, those of one prompt together, within `batch_size` and `max_tokens_per_batch`.

    A prompt counts once in a batch, as in the `shared` layout.
    """
    first: dict[Ids, int] = {}
    for index, (prompt, _) in rows.items():
        first.setdefault(prompt, index)
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(rows, key=lambda index: first[rows[index][0]]):
        prompt, ids = rows[index]
        last = batches[-1] if batches else []
        more = len(ids) + (0 if last and rows[last[-1]][0] == prompt else len(prompt))
        if last and len(last) < block.batch_size and tokens + more <= block.max_tokens_per_batch:
            last.append(index)
            tokens += more
        else:
            batches.append([index])
            tokens = len(prompt) + len(ids)
    return batches


def _load(block: ImplicitScoringBlock, near: Near) -> ItemScorer:
    scorer = ImplicitScorer(block, device_of(near.compute))
    return near.kept(block, scorer, contents=[] if near.cache is None else model_hashes(block))


def model_hashes(block: ImplicitScoringBlock) -> list[str]:
    """Hashes (sha256, hex) of all that decides a score. Raises ScorerError when a model is not there."""
    with of_scorer():
        pair = find_pair(block)
        return hashes_of([pair.policy, pair.reference], block)


def _describe(block: ImplicitScoringBlock, load: bool) -> tuple[str, ...]:
    """Facts, one a line. Raises ScorerError for what would stop the scorer before its weights are read."""
    with of_scorer():
        pair = find_pair(block)
        load_tokenizer(pair.policy.tokenizer, block.trust_remote_code, block.chat_template)
        lines: list[str] = []
        for name, checkpoint in (("policy", pair.policy), ("reference", pair.reference)):
            lines.append(f"{name}: {size_of(checkpoint, block)}, in {places_of(checkpoint)}")
            lines.append(f"sha256 {model_fingerprint(checkpoint)} of its files")
    how = "per token" if block.length_normalised else "summed over tokens"
    return (f"beta {block.beta:g}, {how}", *lines, template_of(block, pair.policy))


KIND: Kind[ImplicitScoringBlock] = Kind(
    _load,
    _describe,
    longest_s=lambda block, batch: block.timeout_s * len(batch),
    code=("implicit.py",),
    packages=("transformers",),
    inputs=lambda block: {f"policy_path={block.policy_path}": model_input(model_hashes(block))},
)
