"""From a config block to a scorer that keeps scores on disk and knows what it took."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    HttpScoringBlock,
    ImplicitScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    ModelScoringBlock,
    RewardModelScoringBlock,
    ScoringBlock,
    VerifierScoringBlock,
)
from raylign.records import Score
from raylign.run.sources import module_sources
from raylign.scoring.base import Compute, ItemScorer, ScoringItem
from raylign.scoring.cache import CachedScorer, ScoreCache, Verdicts
from raylign.scoring.composition import composed, named
from raylign.scoring.function import FunctionScorer
from raylign.scoring.http_service import HttpScorer, label_of
from raylign.scoring.identity import file_hash, identity
from raylign.scoring.judge import JudgeScorer
from raylign.scoring.usage import MeasuredScorer, Usage, Usages
from raylign.scoring.verifier import VerifierScorer, reference_of

ONE_THREAD = Compute()


def _code(spec: str, file: Path) -> list[str]:
    """Hashes (sha256, hex) of the function's file, and of what that imports of its project."""
    imported = sorted(
        hashlib.sha256(one.content).hexdigest() for one in module_sources(spec).files if one.path != file.resolve()
    )
    return [file_hash(file), *imported] if file.is_file() else imported


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
        match block:
            case FunctionScoringBlock():
                function = FunctionScorer(block)
                self.ending.callback(function.close)
                return self._cached(
                    block, MeasuredScorer(function, usage), usage, contents=_code(block.function, function.file)
                )
            case VerifierScoringBlock():
                verifier = VerifierScorer(block)
                self.ending.callback(verifier.close)
                return self._cached(
                    block, MeasuredScorer(verifier, usage), usage, context=lambda item: reference_of(item.prompt, block)
                )
            case JudgeScoringBlock():
                judge = JudgeScorer(block, Verdicts(self._cache(block), identity(block)), usage)
                return MeasuredScorer(judge, usage, judge.amounts)
            case ModelScoringBlock():
                return self._model(block, usage)
            case HttpScoringBlock():
                service = HttpScorer(block)
                return self._cached(
                    block,
                    MeasuredScorer(service, usage, service.amounts),
                    usage,
                    contents=[] if block.chat_template is None else [file_hash(block.chat_template)],
                    context=lambda item: label_of(item, block),
                )

    def _model(self, block: RewardModelScoringBlock | ImplicitScoringBlock, usage: Usage) -> ItemScorer:
        # An actor without a model starts, and is replaced, in a second or two instead of ten.
        from raylign.scoring.models import load_model, model_hashes  # noqa: PLC0415 - torch and transformers

        scorer = MeasuredScorer(load_model(block, self._compute), usage)
        return self._cached(block, scorer, usage, contents=[] if block.cache is None else model_hashes(block))

    def _cached(
        self,
        block: LeafBlock,
        scorer: ItemScorer,
        usage: Usage,
        *,
        contents: Sequence[str] = (),
        context: Callable[[ScoringItem], object] = lambda item: None,
    ) -> ItemScorer:
        cache = self._cache(block)
        if cache is None:
            return scorer
        return CachedScorer(scorer, cache, identity(block, contents), usage, context=context)

    def _cache(self, block: LeafBlock) -> ScoreCache | None:
        if block.cache is None:
            return None
        return ScoreCache(self._run_cache if block.cache == "run" else Path(block.cache))
