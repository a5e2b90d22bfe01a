"""Where generation stops."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylign.errors import ModelError
from raylign.models.resolve import read_facts

_CONFIGS = ("generation_config.json", "config.json")
"""The second counts where there is no first."""


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
