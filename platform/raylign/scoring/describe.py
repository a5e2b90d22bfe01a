"""Who scores, as people read it, found out before anything starts."""

from raylign.config.scoring import FunctionScoringBlock, JudgeScoringBlock, ScoringBlock
from raylign.scoring.function import describe_function
from raylign.scoring.judge_check import check_judge


def describe_scorer(block: ScoringBlock) -> tuple[str, ...]:
    """Name and facts, one a line. Raises ScorerError: the function cannot be loaded, or the judge does not answer."""
    match block:
        case FunctionScoringBlock():
            info = describe_function(block.function, allow_outside=block.allow_outside)
            return block.function, f"{info.file}:{info.line}", f"sha256 {info.sha256}"
        case JudgeScoringBlock():
            check_judge(block)
            return f"judge {block.model}", f"at {block.base_url}", f"criterion: {block.criterion}"
