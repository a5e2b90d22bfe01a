"""From a trained reward model to a folder that transformers reads as a sequence classifier of one output."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raylign.config.blocks import ModelBlock
from raylign.errors import ModelError
from raylign.export.card import RewardModelFacts, reward_card_text
from raylign.export.policy import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    TOKENIZER_CONFIG,
    adapter_file,
    appearing_whole,
    compare,
    copy_code,
    dtype_of,
    load_back,
    refuse_occupied,
    required_base,
    shapes,
    weights_size,
    with_adapter,
)
from raylign.models import end_ids, load_tokenizer
from raylign.models.load import DTYPES, empty_model, open_model
from raylign.models.open import open_config
from raylign.models.resolve import check_facts, stored_shapes
from raylign.models.reward_model import HEAD_WEIGHT, load_reward_model
from raylign.run.files import disk_errors
from raylign.run.tensor_file import tensor_errors
from raylign.training.rewards import score_head
from raylign.training.weights import checkpoint_weights

_PAD = "<|pad|>"
_ANSWERED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]


def export_reward_model(
    source: Path,
    base: str,
    to: Path,
    card: RewardModelFacts,
    in_4bit: ModelBlock | None = None,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the reward model in `source` to the folder `to` with tokenizer, chat template and README.md.

    `source` is an adapter folder, which is merged, or has full weights in safetensors; `base` is the model that
    training started from. Merging adds the update in float32 and rounds once to the dtype of `base`; an adapter that
    was trained on a base in 4 bits, as `in_4bit` says, is merged into what those unpack to, in its dtype. The file
    `chat_template` takes the place of the tokenizer's own. Code that ships with the base model goes with it, and is run
    to load the model, only with `trust_remote_code`.

    transformers reads the reward at the last token that is not the pad token, and would miss the end of an answer if
    the two were one: where they are, the folder's tokenizer and embedding get a pad token of their own. Nor may the
    template write white space behind the end token of an answer, where training has read the reward: the folder's
    template goes without.

    `to` appears whole or not at all, after its tensors were read back and compared by name and shape. Raises ModelError
    when `source` is no such folder, a part is missing, `to` is not empty, or the tensors differ.
    """
    refuse_occupied(to)
    folder = required_base(base, source)
    for checked in (source, folder):
        check_facts(checked)
    named = str(source if (source / TOKENIZER_CONFIG).is_file() else folder)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    with appearing_whole(to, weights_size(folder, in_4bit)) as staging:
        if trust_remote_code:
            copy_code(folder, staging)
        tokenizer = load_tokenizer(named, trust_remote_code, chat_template)
        model = (
            _merged(source, folder, in_4bit, trust_remote_code)
            if is_adapter
            else _full(source, folder, trust_remote_code)
        )
        score_head(model)
        ends = end_ids(tokenizer, (source, folder))
        _end_at_end_token(tokenizer, ends)
        _use_own_pad_token(model, tokenizer, ends)
        with tensor_errors(to, "--to"):
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        loaded = load_back(staging, trust_remote_code, AutoModelForSequenceClassification)
        compare(stored_shapes(staging), loaded, staging)
        with disk_errors(to, "--to"):
            (staging / "README.md").write_text(reward_card_text(card), encoding="utf-8")
    return to


def _config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    config = open_config(str(folder), trust_remote_code)
    config.num_labels = 1
    return config


def _merged(source: Path, base: Path, in_4bit: ModelBlock | None, trust_remote_code: bool) -> PreTrainedModel:
    adapter_file(source)
    config = _config(base, trust_remote_code)
    if in_4bit is not None:
        block = in_4bit.model_copy(update={"lora": None})
        plain = load_reward_model(str(base), block, 0, lambda parameters: nullcontext())
        weights = checkpoint_weights(with_adapter(plain, source), lambda parameters: nullcontext())
        return _filled(config, dict(weights), DTYPES[in_4bit.dtype], source, trust_remote_code)
    dtype, kind = dtype_of(config), AutoModelForSequenceClassification
    opened = open_model(kind, str(base), trust_remote_code, config=config, dtype=torch.float32)
    opened.require_fit(str(base), heads=(HEAD_WEIGHT,))
    merged: PreTrainedModel = with_adapter(opened.model, source).merge_and_unload(safe_merge=True).to(dtype)
    merged.config.dtype = dtype
    return merged


def _full(source: Path, base: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Weights under the names of the model in memory, as the trainer saves them, or as transformers does."""
    if (source / MODEL_CONFIG).is_file():
        load_back(source, trust_remote_code, AutoModelForSequenceClassification)
        return open_model(AutoModelForSequenceClassification, str(source), trust_remote_code).model
    stored_shapes(source)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    if "score.weight" not in weights:
        raise ModelError(
            f"{source}: neither an adapter ({ADAPTER_CONFIG}) nor weights of a reward model (score.weight in "
            "*.safetensors); give a checkpoint of a reward model"
        )
    config = _config(base, trust_remote_code)
    return _filled(config, weights, weights["score.weight"].dtype, source, trust_remote_code)


def _filled(
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    source: Path,
    trust_remote_code: bool,
) -> PreTrainedModel:
    model = empty_model(AutoModelForSequenceClassification, config, trust_remote_code, dtype=dtype)
    compare(shapes(model.state_dict()), shapes(weights), source)
    model.load_state_dict(weights)
    return model


def _end_at_end_token(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> None:
    template, written = tokenizer.chat_template, str(tokenizer.apply_chat_template(_ANSWERED, tokenize=False))
    texts = tuple(token for token in tokenizer.convert_ids_to_tokens(sorted(ends)) if token)
    if written != written.rstrip() and written.rstrip().endswith(texts):
        tokenizer.chat_template = f"{{% set conversation %}}{template}{{% endset %}}{{{{ conversation.rstrip() }}}}"


def _use_own_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
    if tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": _PAD})
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().get_parameter("weight").shape[0]
    if pad >= rows:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().get_parameter("weight")[rows:] = 0.0
    for part in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        part.pad_token_id = pad
