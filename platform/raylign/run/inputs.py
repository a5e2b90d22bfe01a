"""What a run began with, kept as `inputs.json` in its directory: a run goes on only with the same."""

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from raylign.errors import ConfigError
from raylign.records import Prompt
from raylign.run.files import publish_text, read_record
from raylign.tracking.journal import JOURNAL_NAME, read_events

INPUTS_NAME = "inputs.json"


class Rows(Protocol):
    """Prompts or examples of a run, as `raylign.prompts` and `raylign.data` give them."""

    @property
    def train(self) -> Sequence[object]: ...
    @property
    def held_out(self) -> Sequence[object]: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Input:
    """`sha256` (hex) of something that a run reads, and what that is, in words.

    `fixed`: what the run has done so far depends on it for good.
    """

    sha256: str
    what: str
    fixed: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """`inputs.json`; the names are those of settings, with their values where these may change: `model.path`."""

    inputs: Mapping[str, Input]


_INPUTS = TypeAdapter(Inputs)
_TEXT = TypeAdapter(str)
_CURE = "restore it from a copy; without it, the run goes on with whatever its inputs are now"


def rows_digest(rows: Rows) -> str:
    """sha256 (hex) over tokens, and of prompts also over what scorers get to see: messages and other columns."""
    total = hashlib.sha256(rows.digest.encode())
    for row in (*rows.train, *rows.held_out):
        if isinstance(row, Prompt):
            seen = [row.id, [dict(message) for message in row.messages], dict(row.meta)]
            total.update(json.dumps(seen, sort_keys=True, default=repr).encode())
    return total.hexdigest()


def rows_input(rows: Rows) -> Input:
    """The rows that a run reads."""
    return Input(rows_digest(rows), "rows of the data, or how the template writes them", fixed=True)


def require_same(run: Path, rows: Rows, found: Mapping[str, Input]) -> None:
    """Raises ConfigError when inputs of the run directory `run` are others than it began with, naming each.

    Of a run of an earlier version, which has no `inputs.json`, the rows are known by its journal.
    """
    if not (run / INPUTS_NAME).exists():
        _require_rows_of_journal(run, rows, found)
        return
    known = known_inputs(run)
    changed = [name for name in known if name in found and found[name].sha256 != known[name].sha256]
    if changed:
        raise _refusal(run, {name: found[name] for name in changed})


def keep(run: Path, found: Mapping[str, Input]) -> None:
    """Write what the run goes on with, beside what it went on with before; call after `require_same`. DiskError."""
    _write(run, {**known_inputs(run), **found})


def accept(run: Path, names: Collection[str]) -> None:
    """Let the run go on with what the inputs `names` are at its next start.

    Raises ConfigError for names it has not, and for those that what it has done depends on.
    """
    known = known_inputs(run)
    for name in names:
        if name not in known:
            raise ConfigError(f"{run}: it has no input {name!r}; inputs: {', '.join(known) or 'none are recorded'}")
        if known[name].fixed:
            raise _refusal(run, {name: known[name]})
    if names:
        _write(run, {name: one for name, one in known.items() if name not in names})


def known_inputs(run: Path) -> Mapping[str, Input]:
    """What the run directory `run` goes on with, by name; nothing where it has no `inputs.json`."""
    path = run / INPUTS_NAME
    return read_record(path, _INPUTS, _CURE).inputs if path.exists() else {}


def _write(run: Path, inputs: Mapping[str, Input]) -> None:
    publish_text(run / INPUTS_NAME, json.dumps(asdict(Inputs(inputs)), indent=1))


def _require_rows_of_journal(run: Path, rows: Rows, found: Mapping[str, Input]) -> None:
    journal = run / JOURNAL_NAME
    if not journal.is_file():
        return
    event = next((event for event in read_events(journal) if event.name == "prompts"), None)
    if event is not None and event.get("digest", _TEXT) != rows.digest:
        raise _refusal(run, {name: one for name, one in found.items() if name.endswith(".source")})


def _refusal(run: Path, changed: Mapping[str, Input]) -> ConfigError:
    lines = "".join(f"\n  {name}: {one.what}" for name, one in changed.items())
    error = ConfigError(f"{run} began with other inputs than there are now; what has changed:{lines}")
    cures = []
    if any(one.fixed for one in changed.values()):
        cures.append(
            "what the run has done depends on that: restore it, or begin another run (run.name=...), if you like with "
            f"the policy of this one: {shlex.join(['raylign', 'export', str(run), '--to', 'DIR', '--merge'])}, then "
            "model.path=DIR"
        )
    if free := [name for name, one in changed.items() if not one.fixed]:
        options = [word for name in free for word in ("--accept", name)]
        cures.append(f"restore it, or if you mean it: {shlex.join(['raylign', 'resume', str(run), *options])}")
    error.cure = "; ".join(cures)
    return error
