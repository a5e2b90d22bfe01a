"""What makes a scorer the one it is: scores are kept by it, so that a changed scorer is asked again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from raylign.config.scoring import (
    FunctionScoringBlock,
    HttpScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    VerifierScoringBlock,
)
from raylign.fingerprints import fingerprint

OPERATIONAL = frozenset(
    {"allow_outside", "api_key_env", "batch_size", "cache", "canaries", "concurrency", "max_unscored"}
    | {"price_in", "price_out", "retries", "timeout_s"}
)
"""Options on which no score depends."""
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
    return str(fingerprint(path)["sha256"])


def _code(block: LeafBlock) -> Mapping[str, str]:
    match block:
        case FunctionScoringBlock():
            return {}
        case JudgeScoringBlock():
            return _hashes("judge.py", "judge_prompt.py")
        case HttpScoringBlock():
            return _hashes("http_service.py")
        case VerifierScoringBlock():
            return {**_hashes("verify.py"), "math-verify": version("math-verify")}


def _hashes(*names: str) -> dict[str, str]:
    return {name: file_hash(_HERE / name) for name in names}
