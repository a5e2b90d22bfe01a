"""What a scorer reads that its config only names: code, models and templates, by their contents."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    HttpScoringBlock,
    ImplicitScoringBlock,
    JudgeScoringBlock,
    RewardModelScoringBlock,
    ScoringBlock,
    VerifierScoringBlock,
    leaves,
)
from raylign.run.fingerprints import fingerprint
from raylign.run.inputs import Input
from raylign.run.sources import KeptSources, module_sources

CODE = "code"
"""Folder of a run directory with the code that its functions had."""


def scorer_inputs(block: ScoringBlock, place: str = "scoring") -> Iterator[tuple[str, Input]]:
    """Name and content of each; the names are those of settings, with their values. Raises ScorerError."""
    match block:
        case CompositionBlock():
            for name, member in block.members.items():
                yield from scorer_inputs(member, f"{place}.{block.place}{name}")
        case FunctionScoringBlock():
            what = "the code of the function, or of what it imports"
            yield f"{place}.function={block.function}", Input(module_sources(block.function).digest, what, fixed=False)
        case HttpScoringBlock():
            if block.chat_template is not None:
                own = Input(fingerprint(block.chat_template).sha256, "the template", fixed=False)
                yield f"{place}.chat_template={block.chat_template}", own
        case RewardModelScoringBlock():
            yield f"{place}.path={block.path}", _model(block)
        case ImplicitScoringBlock():
            yield f"{place}.policy_path={block.policy_path}", _model(block)
        case JudgeScoringBlock() | VerifierScoringBlock():
            """All of it is in the config, or behind an address."""


def _model(block: RewardModelScoringBlock | ImplicitScoringBlock) -> Input:
    from raylign.scoring.models import model_hashes  # noqa: PLC0415 - torch and transformers

    text = "\n".join(model_hashes(block))
    return Input(hashlib.sha256(text.encode()).hexdigest(), "files of the scorer's model", fixed=False)


def kept_code(block: ScoringBlock, folder: Path) -> dict[str, KeptSources]:
    """The code of each function that scores, by its `module:function`, with a copy below `folder`. Raises DiskError."""
    specs = {leaf.function for leaf in leaves(block) if isinstance(leaf, FunctionScoringBlock)}
    found = {spec: module_sources(spec) for spec in sorted(specs)}
    # What is not found is told better by who loads it.
    return {spec: sources.kept(folder) for spec, sources in found.items() if sources.files}
