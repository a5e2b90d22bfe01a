"""The candidates of a round as they come, one line per prompt: a killed run asks only for the rest."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter

from raylign.records import Candidate, Prompt
from raylign.run.files import disk_errors, publish_file, unreadable

_LINE = TypeAdapter(list[Candidate])
_MOST_TOKEN_ID = 2**31 - 1


class SampledFile:
    """Append-only. `missing` are the prompts that no line answers yet, in order."""

    def __init__(
        self, path: Path, file: IO[bytes], prompts: Sequence[Prompt], found: dict[str, list[Candidate]]
    ) -> None:
        self._path, self._file, self._prompts, self._found = path, file, prompts, found

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.id not in self._found]

    @property
    def candidates(self) -> list[Candidate]:
        """Of all prompts that are answered, prompt-major."""
        return [candidate for prompt in self._prompts for candidate in self._found.get(prompt.id, ())]

    def add(self, candidates: Sequence[Candidate]) -> None:
        """All candidates of one prompt, in index order. Raises DiskError."""
        line = json.dumps([asdict(candidate) for candidate in candidates], allow_nan=False)
        with disk_errors(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        self._found[candidates[0].prompt_id] = list(candidates)


@contextmanager
def sampled_file(path: Path, prompts: Sequence[Prompt], versions: Sequence[int]) -> Iterator[SampledFile]:
    """The file at `path` with what an earlier attempt finished; on disk when the context ends.

    `versions` are the policy versions of a prompt's candidates, in index order. Lines that cannot be read, and those of
    other prompts, other policy versions or another number of candidates, are dropped: their prompts are sampled again.
    """
    wanted = {prompt.id for prompt in prompts}
    kept, found = b"", {}
    for line, candidates in read_sampled(path):
        prompt_id = candidates[0].prompt_id
        if prompt_id in wanted and [candidate.policy_version for candidate in candidates] == list(versions):
            kept, found[prompt_id] = kept + line, candidates
    if not path.is_file() or path.read_bytes() != kept:
        publish_file(path, partial(_write, kept))
    with disk_errors(path):
        file = path.open("ab")
    with file:
        yield SampledFile(path, file, prompts, found)
        with disk_errors(path):
            os.fsync(file.fileno())


def read_sampled(path: Path) -> Iterator[tuple[bytes, list[Candidate]]]:
    """Each line of a file that can be read, with its candidates; nothing where there is no file.

    Raises RecordError when the file cannot be opened.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            lines = file.readlines()
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), "make it readable") from error
    for line in lines:
        if candidates := parse_line(line):
            yield line, candidates


def parse_line(line: bytes) -> list[Candidate]:
    """The candidates of one prompt; [] for a line that was torn or is none of such a file's."""
    if not line.endswith(b"\n"):
        return []
    try:
        # Not by pydantic's own parser, which refuses half a surrogate pair in a text.
        candidates = _LINE.validate_python(json.loads(line))
    except (ValueError, RecursionError):
        return []
    ours = candidates and all(_is_whole(candidate, candidates[0].prompt_id) for candidate in candidates)
    return candidates if ours else []


def _is_whole(candidate: Candidate, prompt_id: str) -> bool:
    return (
        candidate.prompt_id == prompt_id
        and len(candidate.token_ids) == len(candidate.logprobs)
        and all(0 <= token <= _MOST_TOKEN_ID for token in candidate.token_ids)
        and all(map(math.isfinite, candidate.logprobs))
    )


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
