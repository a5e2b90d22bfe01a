"""What is particular to one type of scorer, and what any is asked in one call.

The module that its block names has all of the first, as `KIND`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from raylign.chunks import chunks
from raylign.config.scoring import CompositionBlock, LeafBlock, ScoringBlock, leaves
from raylign.run.fingerprints import fingerprint
from raylign.run.inputs import Input
from raylign.scoring.base import Compute, ItemScorer, ScoringItem, groups
from raylign.scoring.cache import CachedScorer, ScoreCache
from raylign.scoring.usage import MeasuredScorer, Usage

B = TypeVar("B", bound=LeafBlock)
OPERATIONAL = frozenset(
    {"allow_outside", "api_key_env", "batch_size", "cache", "canaries", "concurrency", "max_unscored"}
    | {"max_length", "max_tokens_per_batch", "price_in", "price_out", "retries", "timeout_s", "trust_remote_code"}
    | {"path", "revision", "policy_path", "policy_revision", "reference_path", "reference_revision"}
)
"""Options on which no score depends: of a model's place, what is found there counts."""
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Near:
    """What a scorer is loaded with: the cache for its scores (None: they are not kept), and who ends its processes."""

    compute: Compute
    usage: Usage
    ending: ExitStack
    cache: ScoreCache | None

    def kept(
        self,
        block: LeafBlock,
        scorer: ItemScorer,
        *,
        amounts: Callable[[], Mapping[str, float]] = dict,
        contents: Sequence[str] = (),
        context: Callable[[ScoringItem], object] = lambda item: None,
    ) -> ItemScorer:
        """The scorer, measured, with its scores on disk: by prompt, answer, `context`, and `identity` of `contents`."""
        measured = MeasuredScorer(scorer, self.usage, amounts)
        if self.cache is None:
            return measured
        return CachedScorer(measured, self.cache, identity(block, contents), self.usage, context=context)


def _nothing_else(block: LeafBlock) -> Mapping[str, Input]:
    """All of it is in the config, or behind an address."""
    return {}


@dataclass(frozen=True, slots=True)
class Kind(Generic[B]):
    """`load` and `describe` raise ScorerError."""

    load: Callable[[B, Near], ItemScorer]
    describe: Callable[[B, bool], tuple[str, ...]]
    """Facts, one a line, found out before anything starts; true: as a run will do, by importing code of users."""
    longest_s: Callable[[B, Sequence[ScoringItem]], float]
    """Seconds within which it answers a batch if it works, be that with nothing but failures."""
    code: Sequence[str] = ()
    """Our modules of this folder that decide a score."""
    packages: Sequence[str] = ()
    """Installed packages that do."""
    inputs: Callable[[B], Mapping[str, Input]] = _nothing_else
    """What it reads that its config only names, by `option=value`. Raises ScorerError."""


def kind_of(block: LeafBlock) -> Kind[Any]:
    """That of the block's type; a model's loads torch."""
    found: Kind[Any] = import_module(f"raylign.scoring.{block.module}").KIND
    return found


def batches(items: Sequence[ScoringItem], block: ScoringBlock) -> list[Sequence[ScoringItem]]:
    """`items` in order, at most `batch_size` at a time, the largest one of a composition.

    Items of one prompt that are compared stay together, even where they are more.
    """
    limit = max(leaf.items_per_call for leaf in leaves(block))
    return _whole_groups(items, limit) if block.compares else [*chunks(items, limit)]


def _whole_groups(items: Sequence[ScoringItem], limit: int) -> list[Sequence[ScoringItem]]:
    found: list[list[ScoringItem]] = []
    for group in groups(items):
        if found and len(found[-1]) + len(group) <= limit:
            found[-1].extend(group)
        else:
            found.append(group)
    return [*found]


def longest_s(batch: Sequence[ScoringItem], block: ScoringBlock) -> float:
    """Seconds within which any scorer that works answers, even if with failures alone."""
    if isinstance(block, CompositionBlock):
        return sum(longest_s(batch, member) for member in block.members.values())
    return kind_of(block).longest_s(block, batch)


def identity(block: LeafBlock, contents: Iterable[str] = ()) -> str:
    """sha256 (hex) of the options that decide a score, of our code that does, and of `contents`: hashes of files.

    Of a judge or a service it knows the address and the name, not what answers there: who changes that behind an
    unchanged address takes another cache file.
    """
    kind = kind_of(block)
    options = block.model_dump(mode="json", exclude=set(OPERATIONAL))
    code = {name: file_hash(_HERE / name) for name in kind.code} | {name: version(name) for name in kind.packages}
    facts = {"options": options, "code": code, "contents": [*contents]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file."""
    return fingerprint(path).sha256
