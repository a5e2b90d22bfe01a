"""A preference file as the token ids that both contestants train on, tokenised once, the way TRL does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.base import Block

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class TokenPair(Block):
    """Token ids of a prompt and its two completions, cut to the length limit."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def real_tokens(self) -> int:
        """Tokens of both sequences, without padding: what TRL reports as `num_tokens`."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int) -> list[TokenPair]:
    """The first `count` pairs of a file in LLaMA-Factory's ShareGPT preference format whose prompts leave room.

    As in TRL's trainer: chat template, a completion is what follows the common prefix of prompt and whole, and its end
    is cut at `max_length`. Pairs that the cut makes equal are left out.
    """
    pairs: list[TokenPair] = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        pair = _token_pair(row, tokenizer, max_length)
        if pair is not None:
            pairs.append(pair)
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"{path} has {len(pairs)} usable pairs, {count} are needed; lower --steps or give another --data")


def _token_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenPair | None:
    from trl.data_utils import common_prefix_length  # noqa: PLC0415 - pairs of token ids do without TRL

    turns = [_message(turn) for turn in row["conversations"]]
    prompt = _ids(tokenizer, turns, add_generation_prompt=True)
    wholes = [_ids(tokenizer, [*turns, _message(row[name])]) for name in ("chosen", "rejected")]
    start = min(common_prefix_length(prompt, whole) for whole in wholes)
    chosen, rejected = (tuple(whole[start:max_length]) for whole in wholes)
    if not chosen or not rejected or chosen == rejected:
        return None
    return TokenPair(prompt=tuple(prompt[:start]), chosen=chosen, rejected=rejected)


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], **options: Any) -> list[int]:
    from trl.data_utils import _tokenize  # noqa: PLC0415

    ids: list[int] = _tokenize(tokenizer, list(turns), **options)["input_ids"]
    return ids
