"""What a run's scorer reads that the config only names: code, models and templates, by their contents."""

from collections.abc import Iterator
from pathlib import Path

from raylign.config.scoring import CompositionBlock, FunctionScoringBlock, ScoringBlock, leaves
from raylign.run.inputs import Input
from raylign.run.sources import KeptSources, module_sources
from raylign.scoring.kind import kind_of

CODE = "code"
"""Folder of a run directory with the code that its functions had."""


def scorer_inputs(block: ScoringBlock, place: str = "scoring") -> Iterator[tuple[str, Input]]:
    """Name and content of each; the names are those of settings, with their values. Raises ScorerError."""
    if isinstance(block, CompositionBlock):
        for name, member in block.members.items():
            yield from scorer_inputs(member, f"{place}.{block.place}{name}")
    else:
        for option, content in kind_of(block).inputs(block).items():
            yield f"{place}.{option}", content


def kept_code(block: ScoringBlock, folder: Path) -> dict[str, KeptSources]:
    """The code of each function that scores, by its `module:function`, with a copy below `folder`. Raises DiskError."""
    specs = {leaf.function for leaf in leaves(block) if isinstance(leaf, FunctionScoringBlock)}
    found = {spec: module_sources(spec) for spec in sorted(specs)}
    # What is not found is told better by who loads it.
    return {spec: sources.kept(folder) for spec, sources in found.items() if sources.files}
