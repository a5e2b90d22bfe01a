"""From `prompts` of a recipe to the prompts of a run, and to those of a round."""

import hashlib
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.blocks import PromptsBlock
from raylign.errors import PromptError
from raylign.models.open import TEMPLATE_ERRORS
from raylign.prompts.conversations import ControlTokens, conversation, conversation_problem
from raylign.prompts.quarantine import InvalidRows, refuse
from raylign.prompts.sources import read_source
from raylign.prompts.tables import Fault, Row, Table, is_json_scalar
from raylign.records import Message, Prompt

log = logging.getLogger(__name__)

LENGTH_CURE = "raise generators.max_model_len, lower sampling.max_new_tokens, or shorten the prompts"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of a run, in the order of the source; no prompt is in both parts, and none is there twice.

    Ids are `p` (train) or `h` (held out) and the number of the row in its split: the line from 1 for JSONL, else the
    row from 0. `digest` is a sha256 (hex) over all ids and token ids: equal digests, equal prompts. `invalid` has the
    rows that were left out, split by split. `controlled` counts rows whose text had control tokens.
    """

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    source: str
    digest: str
    invalid: tuple[InvalidRows, ...] = ()
    controlled: int = 0


@dataclass(frozen=True, slots=True)
class _Checked:
    """Good and bad rows of one table; `controlled` of the good ones had control tokens in their text."""

    prompts: list[Prompt]
    invalid: InvalidRows
    controlled: int


def load_prompts(
    block: PromptsBlock,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    seed: int,
    *,
    refused_to: Path | None = None,
) -> PromptSet:
    """Read, check, template and split the prompts; the result depends on the arguments and the source alone.

    The source's own held-out split is used from its start, else `block.held_out` prompts are drawn with `seed`. Bad
    rows are left out. Raises PromptError when more than `block.max_invalid` of a split is bad (every bad row is then
    written to `refused_to`, if given), or when no prompt would be left to train on.
    """
    source = read_source(block)
    tables = [source.train] if source.held_out is None else [source.train, source.held_out]
    for table in tables:
        table.require(block.column)
    checked = _checked("p", source.train, block, tokenizer, max_prompt_tokens)
    parts = [checked]
    if source.held_out is not None:
        parts.append(_checked("h", source.held_out, block, tokenizer, max_prompt_tokens, wanted=block.held_out))
    invalid = tuple(part.invalid for part in parts)
    refuse(invalid, block.max_invalid, refused_to)
    controlled = sum(part.controlled for part in parts)
    train = _unique(checked.prompts, source.train.where)
    if source.held_out is None:
        train, held_out = _drawn(train, block.held_out, seed)
    else:
        held_out = _unique(parts[1].prompts, source.held_out.where)
        train = _without(train, held_out, source.train.where)
    if not train:
        raise PromptError(f"{block.source}: every prompt is also in its held-out split; give other prompts to train on")
    return PromptSet(tuple(train), tuple(held_out), block.source, _digest([*train, *held_out]), invalid, controlled)


def load_all(
    block: PromptsBlock,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    most: int | None = None,
    refused_to: Path | None = None,
) -> PromptSet:
    """Every prompt of `block.split`, or the first `most`, as held-out ones: to evaluate on, none to train on.

    Raises PromptError as `load_prompts` does.
    """
    table = read_source(block).train
    table.require(block.column)
    checked = _checked("h", table, block, tokenizer, max_prompt_tokens, wanted=most)
    refuse((checked.invalid,), block.max_invalid, refused_to)
    prompts = tuple(_unique(checked.prompts, table.where))
    return PromptSet((), prompts, block.source, _digest(prompts), (checked.invalid,), checked.controlled)


def _checked(
    prefix: str,
    table: Table,
    block: PromptsBlock,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    wanted: int | None = None,
) -> _Checked:
    """The rows of a table, from its start until `wanted` are good; rows that could not be read count as looked at.

    Raises PromptError when none is good although `block.max_invalid` would allow that.
    """
    prompts: list[Prompt] = []
    faults = list(table.faults)
    control = ControlTokens(tokenizer, block.control_tokens)
    for row in table.rows:
        if len(prompts) == wanted:
            break
        outcome = _prompt(prefix, row, block, tokenizer, limit, control)
        if isinstance(outcome, Prompt):
            prompts.append(outcome)
        else:
            faults.append(outcome)
    total = len(prompts) + len(faults)
    faults.sort(key=lambda fault: fault.number)
    invalid = InvalidRows(table.where, table.unit, tuple(faults), total)
    if not prompts and invalid.share <= block.max_invalid:
        raise PromptError(f"{table.where}: none of {total} rows can be used; lower prompts.max_invalid to see why")
    control.warn(table.where, table.unit, "prompts.control_tokens")
    return _Checked(prompts, invalid, len(control.found))


def _prompt(
    prefix: str,
    row: Row,
    block: PromptsBlock,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    control: ControlTokens,
) -> Prompt | Fault:
    if row.cells.get(block.column) is None:
        return Fault(row.number, f"no {block.column!r}", dict(row.cells), "fill that column or remove the row")
    value = row.cells[block.column]
    problem, cure = conversation_problem(value)
    if problem:
        return Fault(row.number, problem, value, cure)
    messages = conversation([*control.prompt(row.number, conversation(value, None))], block.system)
    try:
        token_ids = _token_ids(messages, tokenizer)
    except TEMPLATE_ERRORS as error:
        return Fault(row.number, f"refused by the chat template ({error})", value, "order roles as the model expects")
    if len(token_ids) > limit:
        return Fault(row.number, f"{len(token_ids)} tokens, limit {limit}", value, LENGTH_CURE)
    return Prompt(f"{prefix}{row.number:06d}", messages, token_ids, _meta(row.cells, block.column))


def _token_ids(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    turns = [dict(message) for message in messages]
    token_ids: list[int] = tokenizer.apply_chat_template(  # type: ignore[assignment]
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(token_ids)


def _meta(cells: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in cells.items() if name != column and is_json_scalar(value)}


def _unique(prompts: Iterable[Prompt], where: str) -> list[Prompt]:
    """The first of each set of prompts with equal token ids."""
    prompts = list(prompts)
    first: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.token_ids, prompt)
    if len(first) < len(prompts):
        log.info("%s: %d exact duplicates left out of %d prompts", where, len(prompts) - len(first), len(prompts))
    return list(first.values())


def _without(train: list[Prompt], held_out: list[Prompt], where: str) -> list[Prompt]:
    kept_out = {prompt.token_ids for prompt in held_out}
    left = [prompt for prompt in train if prompt.token_ids not in kept_out]
    if len(left) < len(train):
        log.info("%s: %d prompts are also held out and left out of training", where, len(train) - len(left))
    return left


def _drawn(prompts: list[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): `count` prompts drawn without replacement; both keep the source's order."""
    if count >= len(prompts):
        raise PromptError(
            f"prompts.held_out={count} leaves none of {len(prompts)} different prompts to train on; "
            "lower it or add prompts"
        )
    generator = random.Random(f"{seed}/held_out")
    keys = [generator.random() for _ in prompts]
    chosen = set(sorted(range(len(prompts)), key=keys.__getitem__)[:count])
    held_out = [
        Prompt(f"h{prompt.id[1:]}", prompt.messages, prompt.token_ids, prompt.meta)
        for index, prompt in enumerate(prompts)
        if index in chosen
    ]
    return [prompt for index, prompt in enumerate(prompts) if index not in chosen], held_out


def _digest(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}:{','.join(map(str, prompt.token_ids))}\n".encode())
    return digest.hexdigest()


def draw(prompts: Sequence[Prompt], round_index: int, count: int, seed: int) -> tuple[Prompt, ...]:
    """The `count` prompts of round `round_index` (from 1), all different.

    Rounds of the same `count` walk through seeded permutations of `prompts`: each prompt once per permutation, a new
    permutation when the last is used up. Raises PromptError when `count` exceeds the prompts there are.
    """
    if round_index < 1 or count < 1:
        raise ValueError(f"round_index={round_index} and count={count} must be at least 1")
    size = len(prompts)
    if count > size:
        raise PromptError(
            f"schedule.prompts_per_round={count} exceeds the {size} training prompts; lower it or add prompts"
        )
    turn, offset = divmod((round_index - 1) * count, size)
    order = shuffled(size, seed, 0)
    for earlier in range(turn):
        order = _following(order, earlier + 1, count, seed)
    taken = order[offset : offset + count]
    if len(taken) < count:
        taken += _following(order, turn + 1, count, seed)[: count - len(taken)]
    return tuple(prompts[index] for index in taken)


def _following(previous: list[int], turn: int, count: int, seed: int) -> list[int]:
    """Permutation number `turn`, begun so that a round which started in the previous one repeats nothing."""
    size = len(previous)
    order = shuffled(size, seed, turn)
    started = (turn * size) % count
    if not started:
        return order
    used = set(previous[-started:])
    first = [index for index in order if index not in used][: count - started]
    leading = set(first)
    return first + [index for index in order if index not in leading]


def shuffled(size: int, seed: int, turn: int) -> list[int]:
    """Permutation number `turn` of 0..size-1.

    Python keeps `random()` the same for a seed across versions; it promises nothing for `shuffle`.
    """
    generator = random.Random(f"{seed}/{turn}")
    keys = [generator.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)
