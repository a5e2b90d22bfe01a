"""Whether a policy version may become the champion: what is known of it, and every condition that it does not meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylign.config.guard import StopRule
from raylign.evaluation.guard import Decision, over_optimisation
from raylign.records import AnyEvaluation

_CHANGE_HIGH = "_change_high"


@dataclass(frozen=True, slots=True)
class Evidence:
    """A win rate on prompts that chose nothing. Made by `raylign.evaluation.evidence`, read by `refusals`.

    `against` says over whom, `where` on which prompts; `low`/`high` bound `rate` with `confidence`.
    """

    rate: float
    low: float
    high: float
    prompts: int
    confidence: float
    against: str
    where: str

    @property
    def told(self) -> str:
        """`0.700 [0.560, 0.812] (95 %) over the initial policy, on 50 prompts of ...`."""
        bounds = f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] ({100 * self.confidence:g} %)"
        return f"{bounds} over {self.against}, on {self.prompts} {self.where}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A condition that is not met: `found` has the value and the limit."""

    condition: str
    found: str
    cure: str

    @property
    def told(self) -> str:
        return f"{self.condition}: {self.found}; {self.cure}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run has on record of a version besides its win rate.

    `decisions` are those of the guard after its round, `versions` the evaluations from the one before training to its
    own.
    """

    decisions: Sequence[Decision]
    versions: Sequence[AnyEvaluation]


def refusals(evidence: Evidence | Refusal, facts: Facts, above: float) -> list[Refusal]:
    """Every condition that keeps the version from becoming the champion.

    The lower bound of its win rate must be above `above`; no stop rule of the guard may hold; the score must not have
    risen while the gold score fell; and no task of capability may be worse by more than its interval.
    """
    won = [evidence] if isinstance(evidence, Refusal) else _win_rate(evidence, above)
    return [*won, *_stops(facts.decisions), *_hacked(facts.versions), *_capability(facts.versions[-1].capability)]


def _win_rate(evidence: Evidence, above: float) -> list[Refusal]:
    if evidence.low > above:
        return []
    cure = "train on, or if the interval is wide, evaluate on more prompts and give --evaluation RUN"
    return [Refusal("win rate", f"{evidence.told}: its lower bound {evidence.low:.3f} is not above {above:g}", cure)]


def _stops(decisions: Sequence[Decision]) -> list[Refusal]:
    cure = "promote a version before it, or begin another run that stays within the rule"
    return [Refusal("guard", own.told, cure) for own in decisions if isinstance(own.rule, StopRule)]


def _hacked(versions: Sequence[AnyEvaluation]) -> list[Refusal]:
    cure = "promote a version before the gold score fell, or begin another run with a better scorer"
    return [Refusal("gold score", note, cure) for note in over_optimisation(versions)]


def _capability(found: Mapping[str, float]) -> list[Refusal]:
    """Perplexity is worse where it is higher, shares of right answers where they are lower."""
    worse = []
    for name, high in found.items():
        if not name.endswith(_CHANGE_HIGH):
            continue
        task = name.removesuffix(_CHANGE_HIGH)
        low, change = found[f"{task}_change_low"], found[f"{task}_change"]
        rises = f"{task}_nats_per_token" in found
        if (low > 0) if rises else (high < 0):
            bounds = f"{task} changed by {change:+.4g} [{low:+.4g}, {high:+.4g}] since before training"
            limit = "its lower bound is above 0" if rises else "its upper bound is below 0"
            cure = "take an earlier version, or train with a larger loss.beta, a smaller learning rate or fewer rounds"
            worse.append(Refusal("capability", f"{bounds}: {limit}", cure))
    return worse
