"""Scores from a comparison of completions with reference answers, in a child process that can be ended."""

from collections.abc import Sequence
from typing import Any

from raylign.config.scoring import ScoringBlock, VerifierScoringBlock, leaves
from raylign.errors import ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ItemScorer, ScoringItem, most_unscored
from raylign.scoring.ifeval import read_instructions
from raylign.scoring.kind import Kind, Near
from raylign.scoring.process import ProcessScorer

GRACE_S = 2.0
"""Within it a comparison that is late must say so, else its process is ended."""
VERIFY = "raylign.scoring.verify:verify"


class VerifierScorer:
    """1 for the completions that have the reference answer of their prompt's row, else 0.

    An item whose row has no answer, or whose comparison fails or is late, is unscored.
    """

    def __init__(self, block: VerifierScoringBlock) -> None:
        """Start the verifying process."""
        self._block = block
        self._process = ProcessScorer(VERIFY, block, self._arguments, grace_s=GRACE_S)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored."""
        limit = most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed
        missing = [missing_reference(item.prompt, self._block) for item in items]
        asked = [item for item, reason in zip(items, missing, strict=True) if not reason]
        found = iter(self._process.score(asked, limit - (len(items) - len(asked))))
        return [Score(None, reason=reason) if reason else next(found) for reason in missing]

    def close(self) -> None:
        """End the child process."""
        self._process.close()

    def _arguments(self, items: Sequence[ScoringItem]) -> Sequence[Any]:
        answers = [str(reference_of(item.prompt, self._block)) for item in items]
        return [answers, [item.completion for item in items], self._block.model_dump(mode="json")]


def reference_of(prompt: Prompt, block: VerifierScoringBlock) -> object:
    """What the prompt's row has as its answer; None without one."""
    return prompt.meta.get(block.reference_column)


def missing_reference(prompt: Prompt, block: VerifierScoringBlock) -> str:
    """Why a prompt has nothing to compare with; "" where it has, or needs nothing."""
    column, answer = block.reference_column, reference_of(prompt, block)
    if block.method == "ifeval" and isinstance(answer, str):
        return _unreadable(answer, prompt)
    if not block.needs_answer or (_is_answer(answer) and str(answer).strip()):
        return ""
    if answer is None or _is_answer(answer):
        return f"no reference answer in column {column!r} (prompt {prompt.id})"
    kind = type(answer).__name__
    return f"the reference answer in column {column!r} is a {kind}, not a text or number (prompt {prompt.id})"


def _unreadable(cell: str, prompt: Prompt) -> str:
    try:
        read_instructions(cell)
    except ValueError as error:
        return f"{error} (prompt {prompt.id})"
    return ""


def require_references(prompts: Sequence[Prompt], block: ScoringBlock) -> None:
    """Raise ScorerError when more prompts than `max_unscored` allows have no answer that a verifier needs."""
    for leaf in leaves(block):
        if not isinstance(leaf, VerifierScoringBlock):
            continue
        missing = [reason for prompt in prompts if (reason := missing_reference(prompt, leaf))]
        if len(missing) > most_unscored(len(prompts), block.max_unscored):
            raise ScorerError(
                f"{len(missing)} of {len(prompts)} prompts cannot be verified, scoring.max_unscored="
                f"{block.max_unscored:g} allows {block.max_unscored:.0%}; the first: {missing[0]}. Give the rows their "
                "answers, or name their column in the verifier's answer_column"
            )


def _is_answer(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _load(block: VerifierScoringBlock, near: Near) -> ItemScorer:
    verifier = VerifierScorer(block)
    near.ending.callback(verifier.close)
    return near.kept(block, verifier, context=lambda item: reference_of(item.prompt, block))


def _describe(block: VerifierScoringBlock, load: bool) -> tuple[str, ...]:
    what = "instructions" if block.method == "ifeval" else "reference answers"
    reference = f"{what} in column {block.reference_column!r}" if block.needs_answer else "no reference"
    patterns = {"extract": block.extract, "extract_answer": block.extract_answer, "pattern": block.pattern}
    return reference, *(f"{key}: {text}" for key, text in patterns.items() if text is not None)


KIND: Kind[VerifierScoringBlock] = Kind(
    _load,
    _describe,
    longest_s=lambda block, batch: 2 * (block.timeout_s + GRACE_S) * len(batch),
    code=("verify.py", "ifeval.py"),
    packages=("math-verify", "py3langid"),
)
