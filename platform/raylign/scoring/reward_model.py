"""Scores from a reward model: a sequence classifier with one output."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raylign.config.scoring import RewardModelScoringBlock
from raylign.errors import ModelError
from raylign.models.load import DTYPES, load_whole
from raylign.models.open import open_tokenizer, read_config, read_template
from raylign.models.resolve import stored_shapes
from raylign.records import Score
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
from raylign.training.backbone import PaddedAttention, inner_model
from raylign.training.layout_check import supported_layout
from raylign.training.plain_forward import configs_of
from raylign.training.sequences import TokenBatch

_TASK, _ADAPTER_HEADS = "SEQ_CLS", ("score.weight", "classifier.weight")
_AUTO = "AutoModelForSequenceClassification"


def find_reward_model(block: RewardModelScoringBlock) -> tuple[ScorerCheckpoint, PreTrainedConfig]:
    """Where the model is, and its config; no weights are read but their headers.

    Raises ModelError: nothing there, no sequence classifier, or another number of outputs than one.
    """
    checkpoint = find_checkpoint(block.path, block.revision, _TASK)
    config = read_config(checkpoint.base, block.trust_remote_code, PLAIN)
    for adapter in checkpoint.adapters:
        heads = [shape for name, shape in stored_shapes(adapter).items() if name.endswith(_ADAPTER_HEADS)]
        if not heads:
            raise ModelError(
                f"{adapter}: the adapter has no score head, which would start random; give one that was saved with its "
                "head (modules_to_save)"
            )
        _require_one_output(block.path, heads[0][0])
        config.num_labels = heads[0][0]
        return checkpoint, config
    _require_classifier(block.path, config)
    _require_one_output(block.path, config.num_labels)
    return checkpoint, config


def architecture(checkpoint: ScorerCheckpoint, config: PreTrainedConfig) -> str:
    """Its name in config.json; an adapter's is its base's."""
    name = ", ".join(config.architectures or ["unnamed architecture"])
    return f"adapter on {name}" if checkpoint.adapters else name


def _require_classifier(path: str, config: PreTrainedConfig) -> None:
    names = config.architectures or []
    own_code = _AUTO in (config.to_dict().get("auto_map") or {})
    if not own_code and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ModelError(
            f"scoring.path={path} is a {', '.join(names) or 'model without architectures in config.json'}, not a "
            "sequence classifier: its score head would start random; give a reward model"
        )


def _require_one_output(path: str, outputs: int | None) -> None:
    if outputs != 1:
        raise ModelError(
            f"scoring.path={path} has num_labels={outputs}, and a reward is one number; give a reward model that was "
            "trained with num_labels=1"
        )


def load_reward_scorer(
    checkpoint: ScorerCheckpoint, config: PreTrainedConfig, block: RewardModelScoringBlock
) -> PreTrainedModel:
    """The model in `block.dtype`, to be evaluated; its linear `score` head computes in float32.

    An adapter is merged in float32 and rounded once, as `raylign export` does. Raises ModelError when a weight is in no
    file, or an adapter's weight has no place.
    """
    options = model_block(block)
    if checkpoint.adapters:
        options = options.model_copy(update={"dtype": "float32"})
    opened = load_whole(AutoModelForSequenceClassification, checkpoint.base, options, config)
    opened.require_fit(checkpoint.base, heads=_ADAPTER_HEADS if checkpoint.adapters else None)
    for adapter in checkpoint.adapters:
        merged: PreTrainedModel = adapted(opened.model, adapter).merge_and_unload(safe_merge=True)
        return _evaluated(merged.to(DTYPES[block.dtype]))  # type: ignore[arg-type]
    return _evaluated(opened.model)


def _evaluated(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        # bfloat16 would round rewards to three digits, and make ties of their gaps.
        head.float().register_forward_pre_hook(_to_float32)
    model.eval()
    return model


def _to_float32(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.float() for hidden in inputs)


def load_reward_tokenizer(checkpoint: ScorerCheckpoint, block: RewardModelScoringBlock) -> PreTrainedTokenizerBase:
    """The reward model's own tokenizer, with the template of `block` in place of its own where one is named.

    Raises ModelError: no tokenizer, none beside an adapter, or no template.
    """
    folder = checkpoint.tokenizer
    if checkpoint.adapters and folder == checkpoint.base:
        raise ModelError(
            f"{checkpoint.adapters[0]}: an adapter without a tokenizer, so that nobody knows where it reads rewards; "
            "export the run (`raylign export`), or save the tokenizer it was trained with beside it"
        )
    tokenizer = open_tokenizer(folder, block.trust_remote_code)
    if block.chat_template is not None:
        tokenizer.chat_template = read_template(block.chat_template)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{folder}: the reward model's tokenizer has no chat template; name the file of the template it was "
            "trained with in scoring.chat_template"
        )
    return tokenizer


Ids = tuple[int, ...]


class RewardModelScorer:
    """Reads the conversation with the completion as its last message, as the model's own chat template writes it.

    The text of a completion is tokenised again here, by the reward model's own tokenizer; a completion that was cut is
    closed by the template like any other. The score is the model's output where its own forward reads it: decoders
    read at the last token that is not `pad_token_id` of config.json, at the very last where that names none. An
    adapter's is its tokenizer's pad token, as in TRL. Batches are padded on the right and score as single ones do.

    Unscored are completions that are too long, refused by the template, no Unicode, or that write a special token of
    the reward model, with which a policy could end its turn and praise itself in the next; and outputs that are not
    finite.
    """

    def __init__(self, block: RewardModelScoringBlock, device: torch.device) -> None:
        """Load the model. Raises ScorerError: no such model, not a reward model, weights missing, no template."""
        self._block, self._device = block, device
        with of_scorer():
            checkpoint, config = find_reward_model(block)
            self._tokenizer = load_reward_tokenizer(checkpoint, block)
            self._model = load_reward_scorer(checkpoint, config, block).to(device)  # type: ignore[arg-type]
        self._text_config = self._model.config.get_text_config()
        if checkpoint.adapters:
            self._text_config.pad_token_id = self._tokenizer.pad_token_id
        self._limit = length_limit(block, [self._model.config], checkpoint.base)
        self._pad = self._text_config.pad_token_id
        self._rows = self._model.get_input_embeddings().get_parameter("weight").shape[0]

        self._module = PlainRewards(self._model, self._padding)
        with of_scorer():
            supported_layout([self._module], "padded", device)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops once more than `allowed` of `items` are unscored."""
        return in_batches([self._read(item) for item in items], self._plan, self._forward, self._block, allowed)

    def _read(self, item: ScoringItem) -> Ids | Score:
        if fault := fault_of(item.completion, self._tokenizer):
            return Score(None, reason=fault)
        turns: list[Any] = [*map(dict, item.prompt.messages), {"role": "assistant", "content": item.completion}]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            return Score(None, reason=f"refused by the chat template: {error}")
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            return Score(None, reason="the chat template wrote nothing")
        return ids if len(ids) <= self._limit else too_long(len(ids), self._limit)

    def _plan(self, rows: Mapping[int, Ids]) -> list[list[int]]:
        return by_length({index: len(row) for index, row in rows.items()}, self._block)

    def _forward(self, rows: Sequence[Ids]) -> list[Score]:
        return [finite(reward) for reward in self._module.rewards(rows, self._device).tolist()]

    def _padding(self, rows: Sequence[Ids]) -> int:
        """The model's pad token; where it has none, a token that ends no row, so that each is read at its end."""
        if self._pad is not None and 0 <= self._pad < self._rows:
            return int(self._pad)
        ends = {row[-1] for row in rows}
        return next(token for token in count() if token not in ends)


class PlainRewards(nn.Module):
    """A sequence classifier that reads rows by its own forward, padded on the right, its way of attending checked."""

    def __init__(self, model: PreTrainedModel, padding: Callable[[Sequence[Ids]], int]) -> None:
        super().__init__()
        self.model: nn.Module = model
        self._padding = padding
        self.padded_attention: PaddedAttention = "sdpa"

    def forward(self, batch: TokenBatch) -> Tensor:
        """Rewards [C] of a padded batch."""
        lengths = batch.attention_mask.sum(1).tolist()
        rows = [tuple(row[:length]) for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
        return self.rewards(rows, batch.input_ids.device)

    def rewards(self, rows: Sequence[Ids], device: torch.device) -> Tensor:
        """fp32 rewards [C] of token ids."""
        pad, width = self._padding(rows), max(map(len, rows))
        inner = inner_model(self.model)
        inner.config.get_text_config().pad_token_id = pad
        for config in configs_of(inner):
            config._attn_implementation = self.padded_attention
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        rewards: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return rewards.float()

    def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
        """The reward [1] of one row, for the check against transformers."""
        rewards: Tensor = self.model(input_ids=torch.tensor([[*prompt, *completion]], device=device)).logits[0]
        return rewards


def _load(block: RewardModelScoringBlock, near: Near) -> ItemScorer:
    scorer = RewardModelScorer(block, device_of(near.compute))
    return near.kept(block, scorer, contents=[] if near.cache is None else model_hashes(block))


def model_hashes(block: RewardModelScoringBlock) -> list[str]:
    """Hashes (sha256, hex) of all that decides a score. Raises ScorerError when the model is not there."""
    with of_scorer():
        return hashes_of([find_reward_model(block)[0]], block)


def _describe(block: RewardModelScoringBlock, load: bool) -> tuple[str, ...]:
    """Facts, one a line. Raises ScorerError for what would stop the scorer before its weights are read."""
    with of_scorer():
        checkpoint, config = find_reward_model(block)
        tokenizer = load_reward_tokenizer(checkpoint, block)
        facts = (
            f"{architecture(checkpoint, config)}, {size_of(checkpoint, block)}, in {places_of(checkpoint)}",
            f"sha256 {model_fingerprint(checkpoint)} of its files",
            template_of(block, checkpoint),
        )
    pad = tokenizer.pad_token_id if checkpoint.adapters else config.get_text_config().pad_token_id
    if pad is not None and pad == tokenizer.eos_token_id:
        return (*facts, "its pad token is its end token: rewards are read before that, as transformers does")
    return facts


KIND: Kind[RewardModelScoringBlock] = Kind(
    _load,
    _describe,
    longest_s=lambda block, batch: block.timeout_s * len(batch),
    code=("reward_model.py",),
    packages=("transformers",),
    inputs=lambda block: {f"path={block.path}": model_input(model_hashes(block))},
)
