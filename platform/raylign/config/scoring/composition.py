"""Scorers made of named scorers, and the union of everything that can score."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from raylign.config.base import Block
from raylign.config.blocks import Fraction
from raylign.config.scoring.blocks import FunctionScoringBlock, LeafBlock

MEAN, STD = "mean", "std"


def _name(name: str) -> str:
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of a scorer; take small letters, digits and underscores")
    return name


Name = Annotated[str, AfterValidator(_name)]


class CompositionBlock(Block):
    """What compositions share. A candidate that a member leaves unscored is unscored, with the member's reason."""

    place: ClassVar[str] = "scorers."
    """What stands before a member's name in the config."""
    is_judge: ClassVar[bool] = False
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored by the whole."""

    @property
    def members(self) -> "Mapping[str, ScoringBlock]":
        """Scorers by name."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Who scores, in a few words."""
        raise NotImplementedError

    @property
    def compares(self) -> bool:
        """Whether a score depends on the other candidates of the prompt."""
        return any(member.compares for member in self.members.values())

    @model_validator(mode="after")
    def max_unscored_is_of_the_whole(self) -> Self:
        for name, member in self.members.items():
            default = type(member).model_fields["max_unscored"].default
            if member.max_unscored not in (default, self.max_unscored):
                raise ValueError(
                    f"{self.place}{name}.max_unscored={member.max_unscored:g} would say nothing: the limit is of the "
                    "whole; set scoring.max_unscored"
                )
        return self


class EnsembleBlock(CompositionBlock):
    """A composition of equals."""

    scorers: "Mapping[Name, ScoringUnion]" = Field(min_length=1)
    """The members by name. Their values go into `parts` under the name, their own parts under `name/part`."""

    @property
    def members(self) -> "Mapping[str, ScoringBlock]":
        return self.scorers


class WeightedScoringBlock(EnsembleBlock):
    """sum_i weights_i value_i. The members' scales are as they are: the weights must bring them together."""

    type: Literal["weighted"] = "weighted"
    weights: Mapping[str, float]
    """One number per scorer; below 0 is a penalty."""

    @model_validator(mode="after")
    def every_scorer_has_its_weight(self) -> Self:
        if set(self.weights) != set(self.scorers):
            raise ValueError(
                f"weights are of {_listed(self.weights)}, scorers are {_listed(self.scorers)}; "
                "give one weight per scorer"
            )
        return self

    @property
    def title(self) -> str:
        return " ".join(f"{weight:+g} {name}" for name, weight in self.weights.items())


class MinScoringBlock(EnsembleBlock):
    """min_i value_i: worst-case optimisation over an ensemble (Coste et al. 2024, arXiv 2310.02743)."""

    type: Literal["min"] = "min"

    @property
    def title(self) -> str:
        return f"min of {', '.join(self.scorers)}"


class MeanStdScoringBlock(EnsembleBlock):
    """mean_i value_i + std_coefficient std_i value_i, with the population standard deviation over the members.

    Below 0 it is cautious where members disagree, a lower confidence bound; above 0 it explores. `parts` keeps `mean`
    and `std`, the uncertainty.
    """

    type: Literal["mean_std"] = "mean_std"
    std_coefficient: float = -1.0
    """What one standard deviation adds."""

    @model_validator(mode="after")
    def members_can_disagree(self) -> Self:
        if len(self.scorers) < 2:
            raise ValueError(f"scorers={_listed(self.scorers)} cannot disagree; name two at least")
        if taken := self.scorers.keys() & {MEAN, STD}:
            raise ValueError(f"scorers={_listed(taken)} would hide the part of that name; name them otherwise")
        return self

    @property
    def title(self) -> str:
        return f"mean {self.std_coefficient:+g} std of {', '.join(self.scorers)}"


class GateScoringBlock(CompositionBlock):
    """`score` decides where `gate` is at least `threshold`; elsewhere the value is `otherwise`, without asking `score`.

    Say, correct first, then good. A gate that leaves a candidate unscored leaves it unscored.
    """

    place: ClassVar[str] = ""
    type: Literal["gate"] = "gate"
    gate: "ScoringUnion"
    """Must be passed first."""
    score: "ScoringUnion"
    """Its value counts behind the gate; a judge compares only candidates that have passed."""
    threshold: float = 1.0
    """The least value of `gate` that opens it."""
    otherwise: float = -1.0
    """The score before a closed gate; take one that `score` stays above."""

    @property
    def members(self) -> "Mapping[str, ScoringBlock]":
        return {"gate": self.gate, "score": self.score}

    @model_validator(mode="after")
    def nothing_calibrated_is_left_alone(self) -> Self:
        for name, member in self.members.items():
            if is_calibrated(member):
                raise ValueError(
                    f"{name} of type calibrated: an answer that stands alone, as one that passes alone does, gets its "
                    "scorer's own value, which is on another scale; put the gate into the calibrated scorer: "
                    "{type: calibrated, scorer: {type: gate, ...}, ...}"
                )
        return self

    @property
    def title(self) -> str:
        return f"score where gate >= {self.threshold:g}, else {self.otherwise:g}"


class HumanScoringBlock(CompositionBlock):
    """Scores from what people say: a candidate's share of wins against the others of its prompt, 0..1, ties a half.

    Every two different candidates of a prompt are a question in a review queue of MLflow; the run ends as waiting until
    each has an answer, and the same command goes on. As a member of a composition it counts like any other scorer.
    """

    place: ClassVar[str] = ""
    type: Literal["human"] = "human"
    held_out: "ScoringUnion" = FunctionScoringBlock()
    """Scores held-out completions, which stand alone: people only compare. Its scale need not be people's."""

    @property
    def members(self) -> "Mapping[str, ScoringBlock]":
        return {"held_out": self.held_out}

    @property
    def title(self) -> str:
        return "people, who compare candidates in MLflow"

    @property
    def compares(self) -> bool:
        return True


class CalibratedScoringBlock(CompositionBlock):
    """A scorer on the scale of people: the mean, over the other candidates of a prompt, of P(it is better).

    P = 1 / (1 + exp(-slope d)) of the difference d of the scorer's values, and 1/2 where it is within `band` of 1/2
    (`raylign.evaluation.judge_calibration`). `raylign review pull` fits both to what people answered and prints them.
    0..1, as the share of wins of type `human`. A completion that stands alone (held-out) has nothing to be better than:
    it gets the scorer's own value.
    """

    place: ClassVar[str] = ""
    type: Literal["calibrated"] = "calibrated"
    slope: float
    """How much a difference of 1 in the scorer's values tells, in nats of odds; above 0."""
    band: float = Field(0.0, ge=0.0, lt=0.5)
    """How close to 1/2 a probability still is a tie."""
    scorer: "ScoringUnion"
    """Whose values are compared. One of which less is better goes into a `weighted` with the weight -1 first."""

    @property
    def members(self) -> "Mapping[str, ScoringBlock]":
        return {"scorer": self.scorer}

    @property
    def title(self) -> str:
        return f"share of wins, calibrated on people: slope {self.slope:.3g}, tie band {self.band:.3g}"

    @property
    def compares(self) -> bool:
        return True

    @field_validator("slope")
    @classmethod
    def people_prefer_what_the_scorer_does(cls, slope: float) -> float:
        if slope <= 0:
            raise ValueError(
                f"{slope:g} says that people prefer what the scorer gives less, or do not mind; take another scorer, "
                "or one of which less is better as {type: weighted, scorers: {it: ...}, weights: {it: -1}}, with a "
                "slope above 0"
            )
        return slope

    @model_validator(mode="after")
    def people_and_their_likes_are_calibrated_already(self) -> Self:
        if asks_people(self.scorer) or isinstance(self.scorer, CalibratedScoringBlock):
            raise ValueError(
                f"scorer.type={self.scorer.type} would be calibrated on people twice; take the scorer alone that slope "
                "and band were fitted to, and put it beside people in a weighted scorer"
            )
        return self


Composition = (
    WeightedScoringBlock
    | MinScoringBlock
    | MeanStdScoringBlock
    | GateScoringBlock
    | HumanScoringBlock
    | CalibratedScoringBlock
)
ScoringBlock = LeafBlock | Composition
ScoringUnion = Annotated[ScoringBlock, Field(discriminator="type")]

for _block in (
    EnsembleBlock,
    WeightedScoringBlock,
    MinScoringBlock,
    MeanStdScoringBlock,
    GateScoringBlock,
    HumanScoringBlock,
    CalibratedScoringBlock,
):
    _block.model_rebuild()


def leaves(block: ScoringBlock) -> list[LeafBlock]:
    """The scorers that are no compositions, in the config's order."""
    if not isinstance(block, CompositionBlock):
        return [block]
    return [leaf for member in block.members.values() for leaf in leaves(member)]


def by_part(block: ScoringBlock, part: str = "") -> dict[str, ScoringBlock]:
    """Every scorer by the name that its value has in `Score.parts`; the whole has the empty name."""
    found = {part: block}
    if isinstance(block, CompositionBlock):
        for name, member in block.members.items():
            found |= by_part(member, f"{part}/{name}" if part else name)
    return found


def _listed(names: "Mapping[str, object] | set[str]") -> str:
    return ", ".join(sorted(names)) or "none"


def is_calibrated(block: ScoringBlock) -> bool:
    """Whether something in it is calibrated on people, which compares candidates."""
    return any(isinstance(part, CalibratedScoringBlock) for part in by_part(block).values())


def short_tree(block: ScoringBlock) -> dict[str, Any]:
    """`block` as a recipe would write it: its type, and what is not the default. It loads as an equal one."""
    own = block.model_dump(mode="json", exclude_defaults=True)
    members = block.members if isinstance(block, CompositionBlock) else {}
    inner: dict[str, Any] = {name: short_tree(member) for name, member in members.items()}
    return {"type": block.type} | own | ({"scorers": inner} if isinstance(block, EnsembleBlock) else inner)


def asks_people(block: ScoringBlock) -> bool:
    """Whether answers of people have a part in the score of a candidate."""
    if isinstance(block, HumanScoringBlock):
        return True
    return isinstance(block, CompositionBlock) and any(asks_people(member) for member in block.members.values())
