"""Rules that watch the policy from round to round: what is measured, how far it may go, and what is done then."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, model_validator

from raylign.config.base import Block
from raylign.config.evaluation import DISPLACEMENT, MEASURES, ChoiceBlock, EvaluationBlock, Measure
from raylign.config.losses import GrpoLossBlock, KlLossBlock, LossBlock, MixLossBlock, TrainerLoss, members
from raylign.config.losses.base import LossBase
from raylign.config.reference import InitialReferenceBlock, NoReferenceBlock, ReferenceBlock, SamplerReferenceBlock

Loss = TypeVar("Loss", bound=LossBase)


class RuleBase(Block):
    """A measure of the newest version and the bound it must not cross, looked at once after each round."""

    measure: Measure
    above: float | None = None
    """The rule holds where the measure is above this."""
    below: float | None = None
    """The rule holds where the measure is below this."""
    after_rounds: NonNegativeInt = 0
    """Rounds from the first after which it is not looked at yet."""

    @model_validator(mode="after")
    def it_has_one_bound(self) -> Self:
        if (self.above is None) == (self.below is None):
            given = "neither above nor below" if self.above is None else "both above and below"
            raise ValueError(f"a rule on {self.measure} has {given}; give one of them")
        return self

    def holds(self, value: float) -> bool:
        """Whether the measure has crossed the bound."""
        return value > self.above if self.above is not None else self.below is not None and value < self.below

    @property
    def bound(self) -> str:
        """`above 0.5`."""
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"


class WarnRule(RuleBase):
    """Says so."""

    action: Literal["warn"]


class StopRule(RuleBase):
    """Ends the run after the round, as finished."""

    action: Literal["stop"]


class RaiseRule(RuleBase):
    """Multiplies from the next round on, every time it holds.

    `raise_beta`: the loss's beta, in a mix that of every member, which ties the policy to its reference. `raise_kl`:
    the weight of the term kl of a mix, or the beta of grpo and its kin.
    """

    action: Literal["raise_beta", "raise_kl"]
    factor: float = Field(2.0, gt=1.0)


GuardRule = WarnRule | StopRule | RaiseRule
GuardUnion = Annotated[GuardRule, Field(discriminator="action")]


def raised(loss: LossBlock, rule: RaiseRule) -> LossBlock:
    """`loss` after the rule."""
    if not isinstance(loss, MixLossBlock):
        return _with_beta(loss, rule)
    weights = [
        weight * rule.factor if rule.action == "raise_kl" and isinstance(member, KlLossBlock) else weight
        for member, weight in zip(loss.losses, loss.weights, strict=True)
    ]
    changed = {"losses": tuple(_with_beta(member, rule) for member in loss.losses), "loss_weights": tuple(weights)}
    return loss.model_copy(update=changed)


def _with_beta(member: Loss, rule: RaiseRule) -> Loss:
    raises = is_tied(member) if rule.action == "raise_beta" else has_kl_weight(member)
    beta = beta_of(member)
    return member.model_copy(update={"beta": beta * rule.factor}) if raises and beta is not None else member


def beta_of(loss: LossBase | MixLossBlock) -> float | None:
    """The beta of a loss, of a mix that of its first member; None where it has none."""
    first = loss.losses[0] if isinstance(loss, MixLossBlock) else loss
    found = first.model_dump(include={"beta"}).get("beta")
    return None if found is None else float(found)


def is_tied(member: LossBase) -> bool:
    """Whether its beta is the strength that ties the policy to a reference."""
    return member.needs_reference and beta_of(member) is not None and not isinstance(member, GrpoLossBlock)


def has_kl_weight(member: LossBase) -> bool:
    """Whether its beta is the weight of a KL term."""
    return isinstance(member, GrpoLossBlock) and member.beta > 0


def asked_for(rules: Sequence[GuardRule], choice: ChoiceBlock) -> list[str]:
    """Measures that rules and the choice of the best version read."""
    best = choice.metric_for_best_model
    return [*(rule.measure for rule in rules), *([] if best is None else [best])]


def require_known(names: Sequence[str], known: Sequence[str], recipe: str) -> None:
    """Every measure that is asked for is one of the `known` of its recipe."""
    if wrong := next((name for name in names if name not in known), None):
        raise ValueError(f"the recipe {recipe} does not measure {wrong}; take one of {', '.join(known)}")


def require_raisable(rules: Sequence[GuardRule], loss: TrainerLoss) -> None:
    """Who raises something finds it in the loss."""
    for rule in rules:
        if not isinstance(rule, RaiseRule):
            continue
        name = f"guard: action=raise_{'beta' if rule.action == 'raise_beta' else 'kl'} on {rule.measure}"
        if rule.action == "raise_beta" and not any(is_tied(member) for member in _policy_members(loss)):
            raise ValueError(
                f"{name}: loss.loss_type={loss.loss_type} has no beta that ties the policy to a reference; take "
                "action=raise_kl for a loss with a KL term, or warn or stop"
            )
        if rule.action == "raise_kl" and not any(
            isinstance(member, KlLossBlock) or has_kl_weight(member) for member in _policy_members(loss)
        ):
            raise ValueError(
                f"{name}: loss.loss_type={loss.loss_type} has no KL term; add one (loss.loss_type=mix with kl among "
                "its losses, or loss.beta of grpo), or take action=raise_beta"
            )


def _policy_members(loss: TrainerLoss) -> list[LossBase]:
    """The losses that `loss` is made of; of a reward model's none."""
    return [member for member in members(loss) if isinstance(member, LossBase)]


def require_measured(
    names: Sequence[str], evaluation: EvaluationBlock, reference: ReferenceBlock, loss: LossBlock, *, adapter: bool
) -> None:
    """Every measure that is asked for can be had; `adapter`: the trainers hold one."""
    require_known(names, MEASURES, "online_dpo")
    for name in names:
        if name.startswith("gold") and evaluation.gold is None:
            raise ValueError(f"the measure {name} needs a gold scorer; set evaluation.gold, or take another measure")
        opponent = "previous_round" if name.startswith("win_rate_previous") else "initial"
        if name.startswith("win_rate") and opponent not in evaluation.win_rate:
            raise ValueError(
                f"the measure {name} compares with an opponent that evaluation.win_rate leaves out; add {opponent}"
            )
        if name == "kl" and isinstance(reference, NoReferenceBlock | SamplerReferenceBlock):
            raise ValueError(
                f"the measure kl is against the reference, and reference.policy={reference.policy} keeps none to ask; "
                "take kl_initial, or another reference.policy"
            )
        if name.startswith("kl_initial") and not (adapter or isinstance(reference, InitialReferenceBlock)):
            raise ValueError(
                f"the measure {name} needs the initial policy, of which reference.policy={reference.policy} keeps no "
                "copy beside full weights; set model.lora, or reference.policy=initial"
            )
    require_displaceable(names, loss)


def require_displaceable(names: Sequence[str], loss: TrainerLoss) -> None:
    """Who asks for displacement has a loss that tells it."""
    if DISPLACEMENT in names and not is_displaceable(loss):
        raise ValueError(
            f"the measure {DISPLACEMENT} compares log-probs with those of a reference, which loss.loss_type="
            f"{loss.loss_type} does not log; take another measure, or a loss with a reference"
        )


def is_displaceable(loss: TrainerLoss) -> bool:
    """Whether the rewards it logs are beta times the log-ratio to a reference, so that displacement can be told."""
    first = members(loss)[0]
    return isinstance(first, LossBase) and is_tied(first)
