"""From `data` of a recipe to the preferences of a run: read, checked, tokenised, split."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylign.config.data import DataBlock
from raylign.config.offline import Rows
from raylign.data.answers import scores_of, tied
from raylign.data.examples import Example
from raylign.data.load import ExampleStream, read_examples
from raylign.data.tokens import Tokenized, tokenized
from raylign.errors import DataError
from raylign.prompts.quarantine import InvalidRows, refuse
from raylign.prompts.tables import Fault
from raylign.records import Candidate, Preference, Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Rows of a run in the source's order; no prompt is in both parts. Made by `load_preferences`.

    A demonstration is a Preference of one candidate. Prompt ids are `t` (train) or `h` (held out) and the number of the
    row. `digest` is a sha256 (hex) over all ids and token ids. `counts`: `rows` read, of which `invalid`, `ties`,
    `prompt_too_long`, `identical` and `duplicates` are left out and `used` are not; of those used, `truncated` have a
    completion cut at `max_length`, and `boundary_mismatch` a prompt whose end the template writes in another way.
    """

    train: tuple[Preference, ...]
    held_out: tuple[Preference, ...]
    source: str
    digest: str
    invalid: tuple[InvalidRows, ...]
    counts: Mapping[str, int]


def load_preferences(
    block: DataBlock, tokenizer: PreTrainedTokenizerBase, *, rows: Rows, seed: int, refused_to: Path | None
) -> PreferenceData:
    """Read, check, tokenise and split the rows; the result depends on the arguments and the source alone.

    Raises DataError when more than `block.max_invalid` of the rows is bad (every bad row is then written to
    `refused_to`, if given), or too few rows are left to train on.
    """
    stream = read_examples(block)
    faults: list[Fault] = []
    counts: Counter[str] = Counter()
    kept = list(_kept(_read(stream, block, tokenizer, rows, counts), block, tokenizer, counts, faults))
    invalid = InvalidRows(stream.where, stream.unit, tuple(faults), counts["rows"])
    refuse((invalid,), block.max_invalid, refused_to, option="data.max_invalid", error=DataError)
    unique = list({_key(preference): preference for preference in reversed(kept)}.values())[::-1]
    counts["invalid"], counts["duplicates"], counts["used"] = len(faults), len(kept) - len(unique), len(unique)
    train, held_out = _drawn(unique, block, seed, counts, stream.where)
    digest = _digest((*train, *held_out))
    return PreferenceData(train, held_out, block.source, digest, (invalid,), dict(counts))


def _read(
    stream: ExampleStream, block: DataBlock, tokenizer: PreTrainedTokenizerBase, rows: Rows, counts: Counter[str]
) -> Iterator[Tokenized | Fault]:
    def counted() -> Iterator[Example | Fault]:
        for example in islice(stream, block.limit):
            counts["rows"] += 1
            yield example

    return tokenized(counted(), tokenizer, rows, block.system)


def _kept(
    items: Iterable[Tokenized | Fault],
    block: DataBlock,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    faults: list[Fault],
) -> Iterator[Preference]:
    for item in items:
        if isinstance(item, Fault):
            faults.append(item)
        elif reason := _left_out(item, block.max_length):
            counts[reason] += 1
        else:
            preference = _preference(item, block.max_length)
            if len({candidate.token_ids for candidate in preference.candidates}) < len(item.ids):
                counts["identical"] += 1
                continue
            counts["truncated"] += any(candidate.finish_reason == "length" for candidate in preference.candidates)
            _count_mismatch(item, tokenizer, counts)
            yield preference


def _left_out(item: Tokenized, max_length: int) -> str:
    """Why a row that is not malformed cannot be trained on."""
    if tied(item.completions):
        return "ties"
    return "prompt_too_long" if len(item.prompt) >= max_length or not item.prompt else ""


def _count_mismatch(item: Tokenized, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> None:
    if not item.cut:
        return
    if not counts["boundary_mismatch"]:
        log.warning(
            "row %d: the last %d tokens of the templated prompt are not in the templated conversation, because the "
            "template writes a prompt alone in another way or a token reaches over its end. The answer is taken from "
            "where the two part (after %r), so that training sees another context than generation does; give a "
            "template that writes both alike (model.chat_template). Said once, counted as boundary_mismatch",
            item.example.number,
            item.cut,
            tokenizer.decode(list(item.prompt[-8:])),
        )
    counts["boundary_mismatch"] += 1


def _preference(item: Tokenized, max_length: int) -> Preference:
    example = item.example
    labels = dict(example.meta) | ({"language": example.language} if example.language else {})
    prompt = Prompt(f"t{example.number:06d}", item.messages, item.prompt, labels)
    room = max_length - len(item.prompt)
    candidates = tuple(
        Candidate(
            prompt_id=prompt.id,
            index=index,
            token_ids=ids[:room],
            logprobs=(),
            text=str(completion.messages[-1].get("content") or ""),
            finish_reason="length" if len(ids) > room else "stop",
            policy_version=0,
            seed=0,
        )
        for index, (completion, ids) in enumerate(zip(item.completions, item.ids, strict=True))
    )
    return Preference(prompt, candidates, scores_of(item.completions), (1.0,) * len(candidates))


def _key(preference: Preference) -> tuple[tuple[int, ...], ...]:
    return (preference.prompt.token_ids, *(candidate.token_ids for candidate in preference.candidates))


def _drawn(
    rows: Sequence[Preference], block: DataBlock, seed: int, counts: Mapping[str, int], where: str
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """(train, held out): whole prompts are drawn until `block.held_out` rows are; both keep the source's order."""
    groups: dict[tuple[int, ...], int] = Counter(row.prompt.token_ids for row in rows)
    generator = random.Random(f"{seed}/held_out")
    order = sorted(((generator.random(), prompt) for prompt in groups), key=lambda pair: pair[0])
    chosen: set[tuple[int, ...]] = set()
    held = 0
    for _, prompt in order:
        if held >= block.held_out:
            break
        chosen.add(prompt)
        held += groups[prompt]
    train = tuple(row for row in rows if row.prompt.token_ids not in chosen)
    if not train:
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise DataError(
            f"{where}: data.held_out={block.held_out} leaves none of {len(rows)} usable rows to train on ({said}); "
            "lower it, raise data.max_length, or add rows"
        )
    return train, tuple(_held_out(row) for row in rows if row.prompt.token_ids in chosen)


def _held_out(row: Preference) -> Preference:
    name = f"h{row.prompt.id[1:]}"
    candidates = tuple(replace(candidate, prompt_id=name) for candidate in row.candidates)
    return replace(row, prompt=replace(row.prompt, id=name), candidates=candidates)


def _digest(rows: Iterable[Preference]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for ids in _key(row):
            digest.update(f"{row.prompt.id}:{','.join(map(str, ids))}\n".encode())
    return digest.hexdigest()
