"""The one place that lets transformers and PEFT open what others made: configs, tokenizers, chat templates, models.

Their code is run only where the block of the recipe says so, and nobody is asked: without a value of its own,
transformers would ask at the terminal and run the code when something answers y.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.chat_template_utils import render_jinja_template

from raylign.boundary.templates import require_bounded
from raylign.errors import ModelError, RaylignError
from raylign.reading.files import read_text

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template raises: its own errors, and Python's for what it does with a conversation."""
_CHAT = [{"role": "user", "content": "hello"}]
_LONGEST = 1 << 20
"""Bytes of a template."""

UNTRUSTED = "if it needs code of its own, read that code and set model.trust_remote_code=true"
Heads = tuple[str, ...] | None
"""Names of the weights of a head that a recipe makes."""
_SHOWN = 3


def read_chat_template(path: Path) -> str:
    """The template, which must write a user's message and say where the answer begins. Raises ModelError."""
    text = read_template(path)
    if _rendered(path, text, False) == _rendered(path, text, True):
        raise ModelError(
            f"{path}: the template writes nothing for add_generation_prompt, so that no answer would begin; correct "
            "model.chat_template"
        )
    return text


def read_template(path: Path) -> str:
    """The template of a model that only reads conversations, which must write a user's message. Raises ModelError."""
    try:
        text = read_text(path, _LONGEST)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read ({error}); give a Jinja file in UTF-8 (model.chat_template)"
        ) from error
    if "hello" not in _rendered(path, text, False):
        raise ModelError(f"{path}: the template does not write the user's message; correct model.chat_template")
    return text


def _rendered(path: Path, template: str, generation: bool) -> str:
    require_bounded(template, str(path), "correct model.chat_template")
    try:
        rendered: tuple[list[str], Any] = render_jinja_template(  # type: ignore[assignment]
            conversations=[_CHAT],
            chat_template=template,
            add_generation_prompt=generation,
            bos_token="",
            eos_token="",
            pad_token="",
            unk_token="",
        )
    except TEMPLATE_ERRORS as error:
        raise ModelError(f"{path}: not a chat template ({error}); correct model.chat_template") from error
    return rendered[0][0]


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, and what its files and its config.json do not agree on.

    `missing` are weights of the model that no file has, `unexpected` those of files that the model has no place for.
    Weights that transformers declares tied or without meaning are in neither.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def require_fit(self, folder: str, heads: Heads = None) -> None:
        """Raises ModelError unless files and config.json fit.

        `heads` are the weights of a head that the recipe makes where it is missing, in place of any other the files
        have; None takes the head of the files as it is.
        """
        backbone = f"{self.model.base_model_prefix}."
        missing = [name for name in self.missing if not name.endswith(heads or ())]
        unexpected = [name for name in self.unexpected if heads is None or name.startswith(backbone)]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} weights are not in the files, first {missing[0]}, and would start random; "
                "copy the model again, with the config.json that belongs to it"
            )
        if unexpected:
            raise ModelError(
                f"{folder}: config.json has no place for {len(unexpected)} weights of the files, first "
                f"{', '.join(unexpected[:_SHOWN])}; copy the model again, with the config.json that belongs to it"
            )


def open_config(folder: str, trust_remote_code: bool) -> PreTrainedConfig:
    """What config.json says. Raises ModelError."""
    with _opening(f"{folder}: config.json cannot be used", UNTRUSTED):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _refuse_kernels(folder, config, trust_remote_code)
    return config


def open_tokenizer(folder: str, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer as it is. Raises ModelError, also for a chat template that takes too long or too much memory."""
    with _opening(f"{folder}: no tokenizer can be loaded", UNTRUSTED):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str):
            require_bounded(template, folder, "correct it, or take the model from a source that you trust")
    return tokenizer


def open_model(kind: Any, folder: str | None, trust_remote_code: bool, *, where: str = "", **options: Any) -> Opened:
    """The model that `kind`, a class of transformers, makes of the safetensors in `folder`; `options` are its own.

    Without a folder there is a `state_dict` among them, and `where` names what it is of.

    Raises ModelError when it cannot be loaded, or weights have another shape.
    """
    where = folder or where
    with _opening(f"{where}: the model cannot be loaded", UNTRUSTED):
        loaded: tuple[PreTrainedModel, Mapping[str, Any]] = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    model, info = loaded
    if info["mismatched_keys"]:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise ModelError(
            f"{where}: the model cannot be loaded: {len(names)} weights have another shape than config.json says, "
            f"first {names[0]}; copy the model again, with the config.json that belongs to it"
        )
    return Opened(model, *(tuple(sorted(info[name])) for name in ("missing_keys", "unexpected_keys")))


def empty_model(kind: Any, config: PreTrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The model of `config` with weights of no meaning. Raises ModelError."""
    name = config.name_or_path
    with _opening(f"{name}: no model can be made of its config.json", UNTRUSTED):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code, **options)
    return model


def is_adapted(model: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether `model` has an adapter. PEFT takes seconds to import, and is not needed for models without."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def open_adapter(model: nn.Module, folder: Path, **options: Any) -> "PeftModel":
    """`model` under the adapter of `folder`. Raises ModelError when the two do not fit."""
    from peft import PeftModel  # noqa: PLC0415 - takes seconds, and few need it

    with _opening(f"{folder}: the adapter does not fit its base", "give the base it has"):
        adapted: PeftModel = PeftModel.from_pretrained(model, folder, **options)
    return adapted


@contextmanager
def _opening(problem: str, cure: str) -> Iterator[None]:
    """What a library says of files that it cannot open becomes a ModelError."""
    try:
        yield
    except (RaylignError, MemoryError, torch.OutOfMemoryError):
        raise
    # tokenizers raises Exception itself, and the others whatever Python says of a value of another type.
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{problem} ({told}); {cure}") from error


def _refuse_kernels(folder: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """A config.json can name a repository of compiled code to compute with."""
    for part in (config, config.get_text_config()):
        for name in ("_attn_implementation", "_experts_implementation"):
            if not trust_remote_code and "/" in str(getattr(part, name, None) or ""):
                raise ModelError(f"{folder}: config.json computes with code from {getattr(part, name)}; {UNTRUSTED}")
