"""The candidates of a round as they come, one line per prompt: a killed run asks only for the rest."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from raylign.files import disk_errors, publish_file
from raylign.records import Candidate, Prompt


class SampledSheet:
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
def sampled_sheet(path: Path, prompts: Sequence[Prompt], versions: Sequence[int]) -> Iterator[SampledSheet]:
    """The sheet at `path` with what an earlier attempt finished; on disk when the context ends.

    `versions` are the policy versions of a prompt's candidates, in index order. Lines that a crash tore, of other
    prompts, other policy versions or another number of candidates are dropped.
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
        yield SampledSheet(path, file, prompts, found)
        with disk_errors(path):
            os.fsync(file.fileno())


def read_sampled(path: Path) -> Iterator[tuple[bytes, list[Candidate]]]:
    """Each whole line of a sheet with its candidates; nothing where there is no sheet."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        lines = file.readlines()
    for line in lines:
        try:
            rows = json.loads(line) if line.endswith(b"\n") else []
        except ValueError:
            continue
        if rows:
            yield line, [_candidate(row) for row in rows]


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _candidate(row: dict[str, Any]) -> Candidate:
    numbers = {name: tuple(row[name]) for name in ("token_ids", "logprobs")}
    return Candidate(**row | numbers)
