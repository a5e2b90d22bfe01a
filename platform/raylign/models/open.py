"""The one place that lets transformers open the configs, tokenizers and chat templates that others made, without torch.

Their code is run only where the block of the recipe says so, and nobody is asked: without a value of its own,
transformers would ask at the terminal and run the code when something answers y.

Some rotary scalings take their frequencies from the longest sequence of a batch, so that what a sequence gets depends
on its neighbours; vLLM takes them from its limit instead. Up to a length that the config names, all of them agree.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from raylign.boundary.templates import require_bounded
from raylign.config.blocks import ModelBlock
from raylign.errors import ConfigError, ModelError, RaylignError
from raylign.models.resolve import read_facts
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
_CONFIGS = ("generation_config.json", "config.json")
"""The second counts where there is no first."""
PLAIN = (
    "generators and trainer start from the plain ones; give the 16-bit model, with model.load_in_4bit=true for a base "
    "in 4 bits"
)


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


def open_config(folder: str, trust_remote_code: bool) -> PreTrainedConfig:
    """What config.json says. Raises ModelError."""
    with opening(f"{folder}: config.json cannot be used", UNTRUSTED):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _refuse_kernels(folder, config, trust_remote_code)
    return config


def open_tokenizer(folder: str, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer as it is. Raises ModelError, also for a chat template that takes too long or too much memory."""
    with opening(f"{folder}: no tokenizer can be loaded", UNTRUSTED):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str):
            require_bounded(template, folder, "correct it, or take the model from a source that you trust")
    return tokenizer


@contextmanager
def opening(problem: str, cure: str, *kept: type[Exception]) -> Iterator[None]:
    """What a library says of files that it cannot open becomes a ModelError; `kept` are left as they are."""
    try:
        yield
    except (RaylignError, MemoryError):
        raise
    except kept:
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


def context_limit(folder: str, trust_remote_code: bool = False) -> int:
    """Longest sequence, in tokens, that the model of `folder` reads. Raises ModelError if it names no positions."""
    limit = longest_sequence(read_config(folder, trust_remote_code))
    if limit is None:
        raise ModelError(f"{folder}: config.json has no max_position_embeddings; add it")
    return limit


def require_context(option: str, asked: int, folder: str, block: ModelBlock) -> None:
    """Raises ConfigError when `option`, the longest sequence of a run, is more than the model of `folder` reads."""
    limit = context_limit(folder, block.trust_remote_code)
    if asked > limit:
        config = read_config(folder, block.trust_remote_code)
        raise ConfigError(f"{option}={asked} exceeds the {limit} {limit_of(config)} of {folder}; lower it")


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Positions in tokens, and no more than get the rotary frequencies of short ones; None where none are named."""
    positions = _positions(config.get_text_config())
    known = [limit for limit in (positions, switch_length(config)) if limit is not None]
    return min(known, default=None)


def limit_of(config: PreTrainedConfig) -> str:
    """What the tokens of `longest_sequence` are, for people."""
    switch = switch_length(config)
    if switch is None or switch == _positions(config.get_text_config()):
        return "positions"
    return "tokens up to which rotary frequencies stay the same (longer sequences change those of a whole batch)"


def switch_length(config: PreTrainedConfig) -> int | None:
    """Tokens past which transformers takes other rotary frequencies for a whole batch; None where it never does."""
    text = config.get_text_config()
    positions, original = _positions(text), getattr(text, "original_max_position_embeddings", None)
    found = []
    for kind, rope in _ropes(text):
        if "dynamic" in kind:
            found.append(positions)
        elif kind in ("longrope", "su"):
            found.append(original or rope.get("original_max_position_embeddings") or positions)
    return min((int(limit) for limit in found if limit is not None), default=None)


def _positions(text: PreTrainedConfig) -> int | None:
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found


def _ropes(text: PreTrainedConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Type and settings of each rotary embedding; some models have one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(text, name, None)
        if isinstance(settings, Mapping):
            for rope in (settings, *(part for part in settings.values() if isinstance(part, Mapping))):
                yield str(rope.get("rope_type") or rope.get("type") or ""), rope


def end_ids(tokenizer: PreTrainedTokenizerBase, folders: Iterable[Path]) -> frozenset[int]:
    """Ids that may end an answer: the tokenizer's EOS, and those that the model's files in `folders` name.

    Some models end a turn with a token that is not the tokenizer's EOS; Gemma's <end_of_turn> is one. Raises ModelError
    when a file cannot be read.
    """
    files = [[file for name in _CONFIGS if (file := folder / name).is_file()] for folder in folders]
    named = [end for found in files for file in found[:1] for end in _named(file)]
    return frozenset([tokenizer.eos_token_id, *named])


def _named(file: Path) -> list[int]:
    found = read_facts(file).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int for end in ends):
        raise ModelError(f"{file}: eos_token_id={found} is neither an id nor a list of ids; correct it")
    return ends


def load_tokenizer(
    folder: str, trust_remote_code: bool = False, chat_template: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, with a pad token (EOS when it has none of its own) and a chat template.

    The file `chat_template` takes the place of the model's own template. Raises ModelError when one of them cannot be
    read or used, or when there is no EOS token or no template.
    """
    tokenizer = open_tokenizer(folder, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer names no EOS token; set eos_token in tokenizer_config.json")
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template; use an instruction-tuned model, "
            "or name the file of the template it was trained with in model.chat_template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def embedding_rows(folder: str, trust_remote_code: bool = False) -> int:
    """Token ids that the model of `folder` can read, padding of its embedding included."""
    return int(read_config(folder, trust_remote_code).get_text_config().vocab_size)


def read_config(folder: str, trust_remote_code: bool, plain: str = PLAIN) -> PreTrainedConfig:
    """Raises ModelError when it cannot be read, or is of quantised weights: `plain` says what to take instead."""
    config = open_config(folder, trust_remote_code)
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ModelError(f"{folder}: its weights are quantised already ({method}), and {plain}")
    return config


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Log-ratios need one and the same function for policy and sampler, so that dropout stays 0 in train mode too."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
    return config
