"""What makes a scorer the one it is: scores are kept by it, so that a changed scorer is asked again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
"""Options of which a score does not depend."""
_HERE = Path(__file__).parent


def identity(block: LeafBlock, files: Iterable[Path] = ()) -> str:
    """sha256 (hex) of the options that decide a score, of our code that does, and of `files`.

    Of a judge or a service it knows the address and the name, not what answers there: who changes that behind an
    unchanged address takes another cache file.
    """
    options = block.model_dump(mode="json", exclude=set(OPERATIONAL))
    facts = {"options": options, "code": _code(block), "files": [fingerprint(path)["sha256"] for path in files]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _code(block: LeafBlock) -> Mapping[str, Any]:
    match block:
        case FunctionScoringBlock():
            return {}
        case JudgeScoringBlock():
            return _hashes("judge.py", "judge_prompt.py")
        case HttpScoringBlock():
            return _hashes("http_service.py")
        case VerifierScoringBlock():
            return {**_hashes("verify.py"), "math-verify": version("math-verify")}


def _hashes(*names: str) -> dict[str, Any]:
    return {name: fingerprint(_HERE / name)["sha256"] for name in names}
