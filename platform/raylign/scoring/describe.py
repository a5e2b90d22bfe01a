"""Who scores, as people read it, found out before anything starts."""

from raylign.config.scoring import (
    CompositionBlock,
    FunctionScoringBlock,
    GateScoringBlock,
    HttpScoringBlock,
    ImplicitScoringBlock,
    JudgeScoringBlock,
    LeafBlock,
    MeanStdScoringBlock,
    MinScoringBlock,
    RewardModelScoringBlock,
    ScoringBlock,
    VerifierScoringBlock,
    WeightedScoringBlock,
)
from raylign.export.card import public_name
from raylign.scoring.composition import named
from raylign.scoring.function import describe_function
from raylign.scoring.http_service import check_service
from raylign.scoring.judge_check import check_judge
from raylign.scoring.locate import locate_function
from raylign.scoring.models import describe_implicit, describe_reward_model


def describe_scorer(block: ScoringBlock, *, load: bool = True) -> tuple[str, ...]:
    """Name and facts, one a line; those of a composition's members behind their names.

    With `load` functions are imported, in a process of their own, as a run will do; without it they are only located.
    Raises ScorerError: a function cannot be loaded, a judge or service does not answer, a model is not there.
    """
    if not isinstance(block, CompositionBlock):
        return _describe_leaf(block, load)
    lines = [scorer_name(block)]
    for name, member in block.members.items():
        with named(f"{block.place}{name}"):
            first, *facts = describe_scorer(member, load=load)
        lines += [f"{name}: {first}", *(f"  {fact}" for fact in facts)]
    return tuple(lines)


def scorer_name(block: ScoringBlock) -> str:
    """In a few words, by the config alone."""
    match block:
        case FunctionScoringBlock():
            return block.function
        case JudgeScoringBlock():
            return f"judge {block.model}"
        case VerifierScoringBlock():
            return f"verifier by {block.method}"
        case HttpScoringBlock():
            return "reward service"
        case RewardModelScoringBlock():
            return f"reward model {block.path}"
        case ImplicitScoringBlock():
            return f"implicit reward of {block.policy_path} against {block.reference_path}"
        case GateScoringBlock():
            return f"score where gate >= {block.threshold:g}, else {block.otherwise:g}"
        case MinScoringBlock():
            return f"min of {', '.join(block.scorers)}"
        case MeanStdScoringBlock():
            return f"mean {block.std_coefficient:+g} std of {', '.join(block.scorers)}"
        case WeightedScoringBlock():
            return " ".join(f"{weight:+g} {name}" for name, weight in block.weights.items())


def _describe_leaf(block: LeafBlock, load: bool) -> tuple[str, ...]:
    name = scorer_name(block)
    match block:
        case FunctionScoringBlock():
            describe = describe_function if load else locate_function
            info = describe(block.function, allow_outside=block.allow_outside)
            return name, f"{info.file}:{info.line}", f"sha256 {info.sha256}"
        case JudgeScoringBlock():
            check_judge(block)
            return name, f"at {block.base_url}", f"criterion: {block.criterion}"
        case VerifierScoringBlock():
            reference = f"reference answers in column {block.answer_column!r}" if block.needs_answer else "no reference"
            patterns = {"extract": block.extract, "extract_answer": block.extract_answer, "pattern": block.pattern}
            return name, reference, *(f"{key}: {text}" for key, text in patterns.items() if text is not None)
        case HttpScoringBlock():
            check_service(block)
            return name, f"at {block.url}", f"protocol {block.protocol}"
        case RewardModelScoringBlock():
            return name, *describe_reward_model(block)
        case ImplicitScoringBlock():
            return name, *describe_implicit(block)


def public_scorer(block: ScoringBlock) -> str:
    """The scorer for a model card: no path of this machine."""
    match block:
        case CompositionBlock():
            members = ", ".join(f"{name}: {public_scorer(member)}" for name, member in block.members.items())
            return f"{scorer_name(block)} ({members})"
        case JudgeScoringBlock():
            return f"judge {public_name(block.model)}"
        case _:
            return scorer_name(block)
