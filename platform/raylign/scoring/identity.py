"""What makes a scorer the one it is: scores are kept by it, so that a changed scorer is asked again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from raylign.config.scoring import (
    FunctionScoringBlock,
    HttpScoringBlock,
    ImplicitScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    RewardModelScoringBlock,
    VerifierScoringBlock,
)
from raylign.run.fingerprints import fingerprint

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
