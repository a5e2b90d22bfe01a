"""How scored candidates become preferences, in one union on `type`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from raylign.config.base import Block
from raylign.config.blocks import Fraction


class PairingBase(Block):
    """What every way of pairing can leave out, and how it weighs what it keeps.

    Candidates are looked at in this order: unscored ones and, if so chosen, truncated ones go; then those with the
    tokens of an earlier one; then near-duplicates. What is left is paired, and pairs that tie or lie outside the
    margins go; what is drawn at random is drawn among the pairs that stay.
    """

    min_margin: NonNegativeFloat = 0.0
    """Smallest gap of a pair's scores less `length_penalty`; ties never become pairs, whatever the value."""
    max_margin: PositiveFloat | None = None
    """Largest such gap; null allows any."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """A candidate whose token bigrams overlap with an earlier one's by this much (Jaccard) counts as that one."""
    truncated: Literal["keep", "reject_only", "drop"] = "keep"
    """Candidates that ran into the length limit: take them, take them only below one that ended by itself (a ranking:
    below all of those), or leave them out."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken off a score per token, before anything is compared: order, margins, `weights` and what losses read of
    scores go by the rest. A threshold reads the scorer's own score."""
    optimism: NonNegativeFloat = 0.0
    """Candidates are selected by score + optimism x std of an ensemble (`scoring.type=mean_std`), as in optimistic
    exploration (Liu et al. 2024, arXiv 2411.01493); which of a pair is the better one is told by the score alone. A
    score already has `scoring.std_coefficient` (-1) in it, so that 1 selects by the mean and more is optimistic."""
    weights: Literal["none", "margin", "uncertainty"] = "none"
    """Weight of a preference in the loss, scaled to a mean of 1 over the round: the score gap of its best and worst
    candidate, or 1 / (1 + sum of these two's squared std) of an ensemble."""

    pairs: ClassVar[bool] = True
    """Whether every preference has exactly two candidates."""
    told: ClassVar[str] = "answers of a prompt become preference pairs"
    """What becomes of the answers, for model cards."""
    keeps_copies: ClassVar[bool] = False
    """Whether a candidate with the tokens of another one stays."""

    @property
    def needs_std(self) -> bool:
        """Whether every score must have an ensemble's std."""
        return self.optimism > 0 or self.weights == "uncertainty"

    def most(self, candidates: int) -> int:
        """Preferences that a prompt with this number of candidates gives at most."""
        return 1

    @model_validator(mode="after")
    def a_gap_can_lie_within_the_margins(self) -> Self:
        if self.max_margin is not None and self.min_margin > self.max_margin:
            raise ValueError(
                f"min_margin={self.min_margin:g} is above max_margin={self.max_margin:g}, so that no pair is left; "
                "lower the first or raise the second"
            )
        return self


class BestWorstPairingBlock(PairingBase):
    """The best against the worst candidate of each prompt."""

    type: Literal["best_worst"] = "best_worst"
    told: ClassVar[str] = "best and worst answer of a prompt become a preference pair"


class BestRandomPairingBlock(PairingBase):
    """The best against a random one that scores less."""

    type: Literal["best_random"] = "best_random"


class RandomWorstPairingBlock(PairingBase):
    """A random one that scores more against the worst."""

    type: Literal["random_worst"] = "random_worst"


class BestSecondPairingBlock(PairingBase):
    """The best against the best of those that score less: the hardest pair with the best answer in it."""

    type: Literal["best_second"] = "best_second"


class CorrectWrongPairingBlock(PairingBase):
    """Correct against wrong answers, in random pairs; for verifiers (Pang et al. 2024, arXiv 2404.19733).

    `length_penalty` never makes a correct answer wrong: where it outweighs the scores, the pair is left out.
    """

    type: Literal["correct_wrong"] = "correct_wrong"
    threshold: float = 0.5
    """A candidate that scores more is correct, whatever its length."""
    max_pairs: PositiveInt = 1
    """Pairs of a prompt at most."""

    def most(self, candidates: int) -> int:
        return min(self.max_pairs, (candidates // 2) * ((candidates + 1) // 2))


class AllPairsPairingBlock(PairingBase):
    """Every pair with different scores."""

    type: Literal["all_pairs"] = "all_pairs"
    max_pairs: PositiveInt | None = None
    """Pairs of a prompt at most, drawn at random; null takes all."""

    def most(self, candidates: int) -> int:
        every = candidates * (candidates - 1) // 2
        return every if self.max_pairs is None else min(self.max_pairs, every)


class TopMPairingBlock(PairingBase):
    """Each of the m best against each of the m worst; m is lowered where a prompt has fewer than 2 m candidates."""

    type: Literal["top_m"] = "top_m"
    m: PositiveInt = 2

    def most(self, candidates: int) -> int:
        return min(self.m, candidates // 2) ** 2


class QuantilePairingBlock(PairingBase):
    """Two places in the order of scores: a rejected answer of middling quality may teach more than the worst.

    Xiao et al. 2025 (arXiv 2502.16825) find so for many candidates, and put the rejected one at mean - 2 std, which is
    the quantile 0.02 of a normal distribution; of fewer than 26 candidates that is the worst. See `sigma`.
    """

    type: Literal["quantile"] = "quantile"
    chosen: Fraction = 1.0
    """1 is the best candidate, 0 the worst, and between them the nearest place."""
    rejected: Fraction = 0.02

    @model_validator(mode="after")
    def chosen_stands_above_rejected(self) -> Self:
        if self.chosen <= self.rejected:
            raise ValueError(f"chosen={self.chosen:g} is not above rejected={self.rejected:g}; raise it")
        return self


class SigmaPairingBlock(PairingBase):
    """The candidates whose scores are nearest to mean + k std of the prompt's candidates (population std).

    Xiao et al. 2025 (arXiv 2502.16825): with many candidates, mean - 2 std is a better rejected answer than the worst.
    Of five candidates or fewer none lies below that, so that it is the worst.
    """

    type: Literal["sigma"] = "sigma"
    chosen: float | None = None
    """k of the chosen one; null takes the best."""
    rejected: float = -2.0
    """k of the rejected one."""

    @model_validator(mode="after")
    def chosen_stands_above_rejected(self) -> Self:
        if self.chosen is not None and self.chosen <= self.rejected:
            raise ValueError(f"chosen={self.chosen:g} is not above rejected={self.rejected:g}; raise it")
        return self


class LengthMatchedPairingBlock(PairingBase):
    """Of the pairs within the margins the one whose lengths are closest, which keeps length from being learnt."""

    type: Literal["length_matched"] = "length_matched"


class RankingPairingBlock(PairingBase):
    """All candidates in order, for losses of whole lists; equal scores stay and count as ties.

    The margins hold for the gap between the best and the worst.
    """

    type: Literal["ranking"] = "ranking"
    told: ClassVar[str] = "answers of a prompt are ranked by it"
    max_candidates: Annotated[int, Field(ge=2)] | None = None
    """Keep this many, evenly spread over the order, the best and the worst among them; null keeps all."""
    pairs: ClassVar[bool] = False


class GroupPairingBlock(PairingBase):
    """All scored candidates in order, copies too: for losses that compare a candidate with the mean of its group.

    A group of equal scores has nothing to tell and is left out, as DAPO's dynamic sampling does (arXiv 2503.14476);
    `sampling.max_resamples` samples more for it. The margins hold for the gap between the best and the worst, and
    `truncated` `drop` leaves truncated candidates out of the mean too.
    """

    type: Literal["group"] = "group"
    told: ClassVar[str] = "answers of a prompt are ranked by it"
    pairs: ClassVar[bool] = False
    keeps_copies: ClassVar[bool] = True

    @model_validator(mode="after")
    def no_candidate_is_chosen(self) -> Self:
        if self.near_duplicates is not None:
            raise ValueError(
                f"near_duplicates={self.near_duplicates:g} would leave copies out, and a group's mean counts each "
                "sample; leave it out, or take type=ranking for a loss of lists"
            )
        if self.truncated == "reject_only":
            raise ValueError(
                "truncated=reject_only would leave out truncated candidates by their score, and a group's mean counts "
                "all; take keep or drop"
            )
        if self.optimism:
            raise ValueError(f"optimism={self.optimism:g} selects candidates, and a group has all; leave it out")
        return self


class PolicyReferencePairingBlock(PairingBase):
    """A random candidate of the policy against a random one of the reference: XPO's pairs (arXiv 2405.21046 alg. 1).

    Where the policy that samples is the reference itself, two random candidates. They are drawn, as there, whatever
    their scores: the margins are looked at afterwards.
    """

    type: Literal["policy_reference"] = "policy_reference"


PairingBlock = (
    BestWorstPairingBlock
    | BestRandomPairingBlock
    | RandomWorstPairingBlock
    | BestSecondPairingBlock
    | CorrectWrongPairingBlock
    | AllPairsPairingBlock
    | TopMPairingBlock
    | QuantilePairingBlock
    | SigmaPairingBlock
    | LengthMatchedPairingBlock
    | RankingPairingBlock
    | GroupPairingBlock
    | PolicyReferencePairingBlock
)
PairingUnion = Annotated[PairingBlock, Field(discriminator="type")]
