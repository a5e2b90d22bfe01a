"""Whether a policy version may become the champion: what is known of it, and every condition that it does not meet."""

from collections.abc import Sequence
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


def refusals(evidence: Evidence | Refusal, facts: Facts, above: float, tolerated: float) -> list[Refusal]:
    """Every condition that keeps the version from becoming the champion.

    The lower bound of its win rate must be above `above`; no stop rule of the guard may hold; the score must not have
    risen while the gold score fell; and no task of capability may be worse than before training by more than the share
    `tolerated` of what it was, bounds included, or unmeasured where the run measures any.
    """
    won = [evidence] if isinstance(evidence, Refusal) else _win_rate(evidence, above)
    return [*won, *_stops(facts.decisions), *_hacked(facts.versions), *_capability(facts.versions, tolerated)]


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


def _capability(versions: Sequence[AnyEvaluation], tolerated: float) -> list[Refusal]:
    """Perplexity is worse where it is higher, shares of right answers where they are lower."""
    found = versions[-1].capability
    if versions[0].capability and not found:
        cure = "take a version that was (the last one is), or begin a run with evaluation.capability.every=1"
        return [Refusal("capability", "it was measured before training and not of this version", cure)]
    worse = []
    for name in found:
        if not name.endswith(_CHANGE_HIGH):
            continue
        task = name.removesuffix(_CHANGE_HIGH)
        low, high, change = found[f"{task}_change_low"], found[name], found[f"{task}_change"]
        rises = f"{task}_nats_per_token" in found
        limit = tolerated * (found[task] - change) * (1 if rises else -1)
        if (low > limit) if rises else (high < limit):
            bounds = f"{task} changed by {change:+.4g} [{low:+.4g}, {high:+.4g}] since before training"
            passed = f"its {'lower' if rises else 'upper'} bound is {'above' if rises else 'below'} {limit:+.4g}"
            cure = "take an earlier version, or train with a larger loss.beta, a smaller learning rate or fewer rounds"
            worse.append(Refusal("capability", f"{bounds}: {passed}, {tolerated:.0%} of before", cure))
    return worse
