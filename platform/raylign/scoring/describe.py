"""Who scores, as people read it, and what it reads that the config only names: code, models and templates."""

from collections.abc import Iterator

from raylign.config.scoring import CompositionBlock, FunctionScoringBlock, JudgeScoringBlock, ScoringBlock, leaves
from raylign.export.card import public_name
from raylign.run.inputs import Input
from raylign.scoring.composition import named
from raylign.scoring.kind import kind_of


def describe_scorer(block: ScoringBlock, *, load: bool = True) -> tuple[str, ...]:
    """Name and facts, one a line; those of a composition's members behind their names.

    With `load` functions are imported, in a process of their own, as a run will do; without it they are only located.
    Raises ScorerError: a function cannot be loaded, a judge or service does not answer, a model is not there.
    """
    if not isinstance(block, CompositionBlock):
        return block.title, *kind_of(block).describe(block, load)
    lines = [block.title]
    for name, member in block.members.items():
        with named(f"{block.place}{name}"):
            first, *facts = describe_scorer(member, load=load)
        lines += [f"{name}: {first}", *(f"  {fact}" for fact in facts)]
    return tuple(lines)


def public_scorer(block: ScoringBlock) -> str:
    """The scorer for a model card: no path of this machine."""
    match block:
        case CompositionBlock():
            members = ", ".join(f"{name}: {public_scorer(member)}" for name, member in block.members.items())
            return f"{block.title} ({members})"
        case JudgeScoringBlock():
            return f"judge {public_name(block.model)}"
        case _:
            return block.title


def scorer_inputs(block: ScoringBlock, place: str = "scoring") -> Iterator[tuple[str, Input]]:
    """Name and content of each; the names are those of settings, with their values. Raises ScorerError."""
    if isinstance(block, CompositionBlock):
        for name, member in block.members.items():
            yield from scorer_inputs(member, f"{place}.{block.place}{name}")
    else:
        for option, content in kind_of(block).inputs(block).items():
            yield f"{place}.{option}", content


def functions_of(block: ScoringBlock) -> set[str]:
    """`module:function` of each function that scores."""
    return {leaf.function for leaf in leaves(block) if isinstance(leaf, FunctionScoringBlock)}
