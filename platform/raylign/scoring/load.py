"""From a config block to a scorer that keeps scores on disk and knows what it took, and what people read of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    ScoringBlock,
    leaves,
)
from raylign.export.card import public_name
from raylign.records import Score
from raylign.run.inputs import Input
from raylign.scoring.base import Compute, ItemScorer, ScoringItem
from raylign.scoring.cache import ScoreCache
from raylign.scoring.composition import composed, named
from raylign.scoring.kind import Near, kind_of
from raylign.scoring.usage import Usage, Usages

ONE_THREAD = Compute()


class LoadedScorer:
    """Any scorer, and what it took since it was asked last. Made by `load_scorer`."""

    def __init__(self, scorer: ItemScorer, usages: dict[str, Usage], ending: ExitStack) -> None:
        self._scorer, self._usages, self._ending = scorer, usages, ending

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order; see `ItemScorer`."""
        return self._scorer.score(items, allowed)

    def take_usage(self) -> Usages:
        """What was taken since the last time, by scorer."""
        taken = {name: Usage() for name in self._usages}
        for name, usage in self._usages.items():
            taken[name].add(usage)
            usage.clear()
        return taken

    def close(self) -> None:
        """End the processes of scorers that have one."""
        self._ending.close()


def load_scorer(block: ScoringBlock, run_cache: Path, compute: Compute = ONE_THREAD) -> LoadedScorer:
    """The scorer that `block` describes. `run_cache` is the file for scores whose `cache` option is `run`.

    Models run on `compute`. Raises ScorerError, of a member with its place in the config: cannot be loaded, key cannot
    be sent, cache cannot be opened.
    """
    loading = _Loading(run_cache, block.max_unscored, compute)
    with loading.ending:
        scorer = loading.scorer(block, ())
        return LoadedScorer(scorer, loading.usages, loading.ending.pop_all())


class _Loading:
    """Loads one tree of scorers."""

    def __init__(self, run_cache: Path, max_unscored: float, compute: Compute) -> None:
        self.usages: dict[str, Usage] = {}
        self.ending = ExitStack()
        self._run_cache, self._max_unscored, self._compute = run_cache, max_unscored, compute

    def scorer(self, block: ScoringBlock, names: tuple[str, ...]) -> ItemScorer:
        # The limit is of the whole.
        block = block.model_copy(update={"max_unscored": self._max_unscored})
        if isinstance(block, CompositionBlock):
            return composed(block, dict(self._members(block, names)))
        return self._leaf(block, self.usages.setdefault("/".join(names) or block.type, Usage()))

    def _members(self, block: CompositionBlock, names: tuple[str, ...]) -> Iterator[tuple[str, ItemScorer]]:
        for name, member in block.members.items():
            with named(f"{block.place}{name}"):
                yield name, self.scorer(member, (*names, name))

    def _leaf(self, block: LeafBlock, usage: Usage) -> ItemScorer:
        cache = None
        if block.cache is not None:
            cache = ScoreCache(self._run_cache if block.cache == "run" else Path(block.cache))
        return kind_of(block).load(block, Near(self._compute, usage, self.ending, cache))


def describe_scorer(block: ScoringBlock, *, load: bool = True) -> tuple[str, ...]:
    """Name and facts, one a line; those of a composition's members behind their names.

    With `load` functions are imported, in a process of their own, as a run will do; without it they are only located.
    Raises ScorerError: a function cannot be loaded, a judge or service does not answer, a model is not there.
    """
    if not isinstance(block, CompositionBlock):
        return block.title, *kind_of(block).describe(block, load)
    lines = [block.title]
    for name, member in block.members.items():
        with named(f"{block.place}{name}"):
            first, *facts = describe_scorer(member, load=load)
        lines += [f"{name}: {first}", *(f"  {fact}" for fact in facts)]
    return tuple(lines)


def public_scorer(block: ScoringBlock) -> str:
    """The scorer for a model card: no path of this machine."""
    match block:
        case CompositionBlock():
            members = ", ".join(f"{name}: {public_scorer(member)}" for name, member in block.members.items())
            return f"{block.title} ({members})"
        case JudgeScoringBlock():
            return f"judge {public_name(block.model)}"
        case _:
            return block.title


def scorer_inputs(block: ScoringBlock, place: str = "scoring") -> Iterator[tuple[str, Input]]:
    """Name and content of each; the names are those of settings, with their values. Raises ScorerError."""
    if isinstance(block, CompositionBlock):
        for name, member in block.members.items():
            yield from scorer_inputs(member, f"{place}.{block.place}{name}")
    else:
        for option, content in kind_of(block).inputs(block).items():
            yield f"{place}.{option}", content


def functions_of(block: ScoringBlock) -> set[str]:
    """`module:function` of each function that scores."""
    return {leaf.function for leaf in leaves(block) if isinstance(leaf, FunctionScoringBlock)}
