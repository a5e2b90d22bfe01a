"""What was found out of a model before: the same question about the same files takes no torch a second time."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from pydantic import BaseModel, ConfigDict, ValidationError

import raylign
from raylign.boundary.beside import asked
from raylign.config.blocks import ModelBlock
from raylign.errors import DiskError
from raylign.models.cache import cache_root, sha256_of
from raylign.models.resolve import CONFIG, stored_shapes
from raylign.run.files import publish_text

T = TypeVar("T", bound=int | None)
Ts = TypeVarTuple("Ts")
_PACKAGES = ("torch", "transformers", "safetensors")
_CODE = ("models", "training")
"""Folders of ours with the code that looks at models."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    answer: int | None


def remembered(
    folders: Sequence[str], block: ModelBlock, what: str, function: Callable[[*Ts], T], *args: *Ts
) -> Callable[[], T]:
    """`asked(function, *args)`, or what the same question about the same files came to before.

    The question is the function and its file, `what`, and all of `block` but its place. Of a folder config.json and the
    shapes in its files count, for no weights are read. Not kept: failures, and answers about models with code of their
    own. Answers lie in `answers` of the cache; one without room for them asks anew.
    """
    if block.trust_remote_code:
        return asked(function, *args)
    files = [[sha256_of(Path(folder) / CONFIG), sorted(stored_shapes(Path(folder)).items())] for folder in folders]
    options = block.model_dump(mode="json", exclude={"path", "revision"})
    own = sha256_of(Path(function.__code__.co_filename))
    question = [function.__name__, own, what, options, files, _versions()]
    name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    file = cache_root() / "answers" / f"{name}.json"
    with suppress(OSError, ValidationError):
        known: T = _Answer.model_validate_json(file.read_bytes()).answer  # type: ignore[assignment]
        return lambda: known
    pending = asked(function, *args)

    def answer() -> T:
        found = pending()
        with suppress(DiskError):
            publish_text(file, _Answer(answer=found).model_dump_json())
        return found

    return answer


@cache
def _versions() -> list[str]:
    """Of the libraries and of our code."""
    root = Path(raylign.__file__).parent
    code = sorted(path for folder in _CODE for path in (root / folder).rglob("*.py"))
    return [version(name) for name in _PACKAGES] + [sha256_of(path) for path in code]
