"""Folders to reward models: sequence classifiers of transformers with one output, whose weights are all there."""

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raylign.config.scoring import RewardModelScoringBlock
from raylign.errors import ModelError
from raylign.models.load import DTYPES, load_whole
from raylign.models.open import open_tokenizer, read_config, read_template
from raylign.models.resolve import stored_shapes
from raylign.scoring.checkpoints import PLAIN, ScorerCheckpoint, adapted, find_checkpoint, model_block

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
