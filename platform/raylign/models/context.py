"""How long a sequence a model reads as it reads any shorter one.

Some rotary scalings take their frequencies from the longest sequence of a batch, so that what a sequence gets depends
on its neighbours; vLLM takes them from its limit instead. Up to a length that the config names, all of them agree.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from raylign.config.blocks import ModelBlock
from raylign.errors import ConfigError, ModelError
from raylign.models.load import read_config


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
