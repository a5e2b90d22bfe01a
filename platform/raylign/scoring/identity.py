"""What makes a scorer the one it is: its options, code, models and templates. Kept scores and resumed runs ask here."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    HttpScoringBlock,
    ImplicitScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    RewardModelScoringBlock,
    ScoringBlock,
    VerifierScoringBlock,
    leaves,
)
from raylign.run.fingerprints import fingerprint
from raylign.run.inputs import Input
from raylign.run.sources import KeptSources, module_sources

OPERATIONAL = frozenset(
    {"allow_outside", "api_key_env", "batch_size", "cache", "canaries", "concurrency", "max_unscored"}
    | {"max_length", "max_tokens_per_batch", "price_in", "price_out", "retries", "timeout_s", "trust_remote_code"}
    | {"path", "revision", "policy_path", "policy_revision", "reference_path", "reference_revision"}
)
"""Options on which no score depends: of a model's place, what is found there counts."""
_HERE = Path(__file__).parent


def identity(block: LeafBlock, contents: Iterable[str] = ()) -> str:
    """sha256 (hex) of the options that decide a score, of our code that does, and of `contents`: hashes of files.

    Of a judge or a service it knows the address and the name, not what answers there: who changes that behind an
    unchanged address takes another cache file.
    """
    options = block.model_dump(mode="json", exclude=set(OPERATIONAL))
    facts = {"options": options, "code": _code(block), "contents": [*contents]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file."""
    return fingerprint(path).sha256


def _code(block: LeafBlock) -> Mapping[str, str]:
    match block:
        case FunctionScoringBlock():
            return {}
        case JudgeScoringBlock():
            return _hashes("judge_prompt.py")
        case HttpScoringBlock():
            return _hashes("http_service.py")
        case VerifierScoringBlock():
            return {**_hashes("verify.py"), "math-verify": version("math-verify")}
        case RewardModelScoringBlock():
            return {**_hashes("reward_model.py", "reward_checkpoint.py"), "transformers": version("transformers")}
        case ImplicitScoringBlock():
            return {**_hashes("implicit.py", "implicit_checkpoints.py"), "transformers": version("transformers")}


def _hashes(*names: str) -> dict[str, str]:
    return {name: file_hash(_HERE / name) for name in names}


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
