"""Anthropic's HH transcripts: whole dialogues in `chosen` and `rejected` that differ in the last answer."""

import re
from collections.abc import Mapping
from typing import Any

from raylign.data.formats.parts import BadRow, Cells, Parts, pair, text, turns_of, used
from raylign.data.formats.trl import split_turns

COLUMNS = (("chosen", "rejected"),)
SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def parse(row: Cells) -> Parts:
    """One row: the prompt is what both dialogues share, the answers are their last turns. Raises BadRow."""
    chosen, rejected = (turns_of(name, _turns(name, text(row, name))) for name in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends with Human", row[name], "end with what the Assistant answers")
    prompt, better, worse = split_turns(chosen, rejected)
    return Parts(prompt, pair(better, worse), True, used(row, ("chosen", "rejected")))


def is_transcript(value: object) -> bool:
    """Whether a cell looks like a dialogue of this format."""
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


def _turns(name: str, transcript: str) -> list[Mapping[str, Any]]:
    before, *parts = SPEAKER.split(transcript)
    if before.strip() or not parts:
        raise BadRow(f"{name} does not begin with Human:", transcript, "begin with a line 'Human: ...'")
    speakers, texts = parts[::2], parts[1::2]
    return [{"role": ROLES[speaker], "content": said.strip()} for speaker, said in zip(speakers, texts, strict=True)]
