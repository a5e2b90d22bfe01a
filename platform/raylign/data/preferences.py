"""From `data` of a recipe to the preferences of a run: read, checked, tokenised, split."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylign.config.data import DataBlock
from raylign.config.offline import Rows
from raylign.data.examples import ORDER, Example, scale_of
from raylign.data.rows import ExampleStream, read_examples
from raylign.data.split import key, split
from raylign.data.tokens import Reason, Tokenized, preference, tokenized
from raylign.errors import DataError
from raylign.prompts.conversations import ControlTokens
from raylign.prompts.quarantine import InvalidRows, refuse
from raylign.prompts.tables import Fault
from raylign.records import Preference

log = logging.getLogger(__name__)

_CURES: Mapping[Reason, str] = {
    "prompt_too_long": "raise data.max_length",
    "ties": "give answers of different quality",
    "identical": "give answers that differ, or raise data.max_length if they differ behind it",
}
_APART = (
    "%s: in %d rows, the first with %s %d, a token reaches over the end of the prompt once an answer follows; such "
    "answers are tokenised apart, so that training sees the prompt as generation does (counted as boundary_mismatch). "
    "A prompt that ends with a whole token, such as a line break or a special token, avoids that (model.chat_template)"
)
_WITHOUT_END = (
    "%s: in %d rows, the first with %s %d, the chat template writes no token at the answer's end that stops generation "
    "(counted as without_end); a model trained so does not learn to stop. End the assistant's turn with "
    "{{ eos_token }} (model.chat_template), or make the token it ends with the tokenizer's eos_token"
)


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Rows of a run in the source's order; no prompt is in both parts. Made by `load_preferences`.

    A demonstration is a Preference of one candidate. Prompt ids are `t` (train) or `h` (held out) and the number of the
    row. `digest` is a sha256 (hex) over all ids, token ids and scores. `counts`: `rows` were read; `invalid`, `ties`,
    `prompt_too_long`, `identical` and `duplicates` are left out and `used` are not. Of those that are neither bad nor
    left out for a reason of their own, `truncated` have a completion cut at `max_length`, `repeated` go without an
    answer that a better one repeats, `boundary_mismatch` have an answer tokenised apart from its prompt, and
    `without_end` have one without an end token. Of all rows, `control_tokens` have tokens of the chat template in the
    text of their messages.
    """

    train: tuple[Preference, ...]
    held_out: tuple[Preference, ...]
    source: str
    digest: str
    invalid: tuple[InvalidRows, ...]
    counts: Mapping[str, int]


def load_preferences(
    block: DataBlock,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Rows,
    ends: frozenset[int],
    seed: int,
    refused_to: Path | None,
) -> PreferenceData:
    """Read, check, tokenise and split the rows; the result depends on the arguments and the source alone.

    `ends` are the ids that generation stops at (`raylign.models.end_ids`). Raises DataError when more than
    `block.max_invalid` of the rows is bad (every bad row is then written to `refused_to`, if given), or too few rows
    are left to train on.
    """
    stream = read_examples(block)
    seen = _Seen(Counter(), {}, [])
    control = ControlTokens(tokenizer, block.control_tokens)
    examples = _counted(stream, block.limit, seen, control)
    made = list(_kept(tokenized(examples, tokenizer, rows, block.system, ends), block.max_length, tokenizer, seen))
    invalid = InvalidRows(stream.where, stream.unit, tuple(seen.faults), seen.counts["rows"])
    refuse((invalid,), block.max_invalid, refused_to, option="data.max_invalid", error=DataError)
    _warn(stream, seen)
    control.warn(stream.where, stream.unit, "data.control_tokens")
    unique = list({key(one): one for one in reversed(made)}.values())[::-1]
    counts = seen.counts
    counts["invalid"], counts["duplicates"], counts["used"] = len(seen.faults), len(made) - len(unique), len(unique)
    counts.update({"control_tokens": len(control.found)} if control.found else {})
    if not unique:
        raise DataError(_nothing_left(stream.where, counts))
    train, held_out = split(unique, block.held_out, seed, stream.where)
    digest = _digest((*train, *held_out))
    return PreferenceData(train, held_out, block.source, digest, (invalid,), dict(counts))


def mixed_scales(data: PreferenceData, options: Sequence[str]) -> str:
    """What a loss whose `options` read how far scores are apart should know of the rows; "" where all is well."""
    counts = Counter(map(scale_of, (*data.train, *data.held_out)))
    if not options or len(counts) < 2:
        return ""
    scales = ", ".join(
        f"{count} rows have {scale}{' (their scores are places)' if scale == ORDER else ''}"
        for scale, count in counts.most_common()
    )
    return (
        f"{data.source}: loss.{' and loss.'.join(options)} reads how far scores are apart as if on one scale, and they "
        f"are on {len(counts)}: {scales}; train on rows of one of them, or leave that option out"
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the rows read so far were: `counts` of PreferenceData, the `first` row of each, and the bad rows."""

    counts: Counter[str]
    first: dict[str, int]
    faults: list[Fault]

    def count(self, name: str, number: int) -> None:
        self.counts[name] += 1
        self.first.setdefault(name, number)


def _counted(
    stream: ExampleStream, limit: int | None, seen: _Seen, control: ControlTokens
) -> Iterator[Example | Fault]:
    for example in islice(stream, limit):
        seen.counts["rows"] += 1
        if isinstance(example, Example):
            for completion in example.completions:
                control.look(example.number, completion.messages)
            example = replace(example, prompt=control.prompt(example.number, example.prompt))
        yield example


def _kept(
    items: Iterable[Tokenized | Fault], max_length: int, tokenizer: PreTrainedTokenizerBase, seen: _Seen
) -> Iterator[Preference]:
    for item in items:
        if isinstance(item, Fault):
            seen.faults.append(item)
            continue
        one = preference(item, max_length, tokenizer)
        if isinstance(one, str):
            seen.count(one, item.example.number)
            continue
        facts = {
            "truncated": any(candidate.finish_reason == "length" for candidate in one.candidates),
            "repeated": len(one.candidates) < len(item.ids),
            "boundary_mismatch": item.apart,
            "without_end": not item.ended,
        }
        for name, holds in facts.items():
            if holds:
                seen.count(name, item.example.number)
        yield one


def _warn(stream: ExampleStream, seen: _Seen) -> None:
    for name, text in (("boundary_mismatch", _APART), ("without_end", _WITHOUT_END)):
        if count := seen.counts[name]:
            log.warning(text, stream.where, count, stream.unit, seen.first[name])


def _nothing_left(where: str, counts: Mapping[str, int]) -> str:
    why = [(reason, cure) for reason, cure in _CURES.items() if counts.get(reason)]
    lost = "".join(f"\n  {counts[reason]} {reason.replace('_', ' ')}: {cure}" for reason, cure in why)
    bad = f"\n  {counts['invalid']} bad: lower data.max_invalid to see why" if counts["invalid"] else ""
    return f"{where}: none of {counts['rows']} rows can be trained on{lost}{bad}"


def _digest(rows: Iterable[Preference]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for values in (*key(row), row.scores):
            digest.update(f"{row.prompt.id}:{','.join(map(str, values))}\n".encode())
    return digest.hexdigest()
