"""Scores from a Python function that the user names as `module:function`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.run.inputs import Input
from raylign.run.sources import module_sources
from raylign.scoring.base import ItemScorer, ScoringItem
from raylign.scoring.kind import Kind, Near, file_hash
from raylign.scoring.locate import FunctionInfo, locate_function
from raylign.scoring.process import ProcessScorer, ScoringProcess


def describe_function(spec: str, *, allow_outside: bool = False) -> FunctionInfo:
    """Locate `module:function`, doing nothing with it but the import, in a process of its own.

    Raises ScorerError, also for code outside the working directory and the packages installed in this environment:
    such code does not run unless `allow_outside`.
    """
    process = ScoringProcess(spec, confined=not allow_outside)
    process.kill()
    file = Path(process.location.file)
    if not file.is_file():
        raise ScorerError(
            f"scoring.function={spec} has no source file to show; wrap it in a function of your own module"
        )
    return FunctionInfo(file, hashlib.sha256(file.read_bytes()).hexdigest(), process.location.line)


class FunctionScorer(ProcessScorer):
    """Calls `function(prompts, completions) -> list[float | None]` in a child process without secrets.

    As TRL's reward functions, it gets two parallel lists: `prompts`, each a list of chat messages (dicts with "role"
    and "content"), and `completions`, plain strings. It returns one number per completion, higher is better, or None
    to abstain; a `raylign.records.Score` in a number's place can add `parts` or the reason. An item may be asked again
    alone, and its score is kept on disk: a function whose scores depend on the rest of the batch is not suitable, and
    one that draws at random is asked once.
    """

    def __init__(self, block: FunctionScoringBlock) -> None:
        """Load the function. Raises ScorerError: no such module, no such function, not callable, failing import."""
        super().__init__(block.function, block, _arguments)


def _arguments(items: Sequence[ScoringItem]) -> Sequence[Any]:
    return [
        [[dict(message) for message in item.prompt.messages] for item in items],
        [item.completion for item in items],
    ]


def _load(block: FunctionScoringBlock, near: Near) -> ItemScorer:
    function = FunctionScorer(block)
    near.ending.callback(function.close)
    return near.kept(block, function, contents=_code(block.function, function.file))


def _code(spec: str, file: Path) -> list[str]:
    """Hashes (sha256, hex) of the function's file, and of what that imports of its project."""
    imported = sorted(
        hashlib.sha256(one.content).hexdigest() for one in module_sources(spec).files if one.path != file.resolve()
    )
    return [file_hash(file), *imported] if file.is_file() else imported


def _describe(block: FunctionScoringBlock, load: bool) -> tuple[str, ...]:
    info = (describe_function if load else locate_function)(block.function, allow_outside=block.allow_outside)
    return f"{info.file}:{info.line}", f"sha256 {info.sha256}"


def _inputs(block: FunctionScoringBlock) -> dict[str, Input]:
    what = "the code of the function, or of what it imports"
    return {f"function={block.function}": Input(module_sources(block.function).digest, what, fixed=False)}


KIND: Kind[FunctionScoringBlock] = Kind(
    _load, _describe, longest_s=lambda block, batch: 2 * block.timeout_s * len(batch), inputs=_inputs
)
