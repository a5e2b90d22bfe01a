"""What a run's measures come to: what its guard does after a round, its best version, and whether it goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from raylign.config import RunConfig
from raylign.config.evaluation import DISPLACEMENT, GOLD_DROP, LENGTH_GROWTH, ChoiceBlock
from raylign.config.guard import GuardRule, RaiseRule, StopRule, WarnRule, raised
from raylign.config.losses import LossBlock
from raylign.evaluation.health import DISPLACED
from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation, RoundReport

C = TypeVar("C", bound=RunConfig)
Measures = Mapping[str, float]
"""Of one policy version, by name; what could not be measured is not there."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A rule that held after a round, and the measure's value. Made by `decide`, kept in `guard.json` of the round."""

    rule: GuardRule
    value: float

    @property
    def told(self) -> str:
        """`kl is 0.7, above 0.5: loss.beta x 2 from the next round on`."""
        return f"{self.rule.measure} is {self.value:.4g}, {self.rule.bound}: {consequence(self.rule)}"


def consequence(rule: GuardRule) -> str:
    """What is done where the rule holds."""
    match rule:
        case WarnRule():
            return "warning"
        case StopRule():
            return "the run ends here"
        case RaiseRule(action="raise_beta"):
            return f"loss.beta x {rule.factor:g} from the next round on"
        case RaiseRule():
            return f"the weight of the KL term x {rule.factor:g} from the next round on"


@dataclass(frozen=True, slots=True)
class Best:
    """The version that was best so far by a measure; 0 is the policy before training."""

    version: int
    value: float
    waited: int
    """Rounds in a row since without one that was better by the threshold."""


def measures(baseline: AnyEvaluation, reports: Sequence[RoundReport]) -> list[Measures]:
    """What of every version was measured, from the one before training (0) on.

    Numbers of its evaluation by their names; `length_growth`, the share by which its completions are longer than those
    before training; `gold_drop`, how far its gold score is below the best one so far, 0 for the best; `displacement`,
    in nats, `raylign.evaluation.health.round_health`'s. Of held-out rows TRL's metrics, the one that sums them up with
    its bounds.
    """
    of_rounds = [(report.evaluation, report.health) for report in reports]
    versions: list[tuple[AnyEvaluation, Measures]] = [(baseline, {}), *of_rounds]
    found: list[Measures] = []
    golds: list[float] = []
    for evaluation, health in versions:
        own: dict[str, float | None] = {DISPLACEMENT: health.get(DISPLACED)}
        match evaluation:
            case HeldOutEvaluation(metric=metric, value=value, low=low, high=high):
                own |= {**evaluation.metrics, metric: value, f"{metric}_low": low, f"{metric}_high": high}
            case Evaluation():
                own |= asdict(evaluation)
                if isinstance(baseline, Evaluation) and baseline.length:
                    own[LENGTH_GROWTH] = evaluation.length / baseline.length - 1
                if evaluation.gold is not None:
                    golds.append(evaluation.gold)
                    own[GOLD_DROP] = max(golds) - evaluation.gold
        found.append({name: value for name, value in own.items() if isinstance(value, int | float)})
    return found


def decide(rules: Sequence[GuardRule], measured: Measures, index: int) -> tuple[Decision, ...]:
    """What the guard does after round `index`, whose version measures so: every rule that holds, in the config's order.

    A rule on what was not measured does nothing.
    """
    known = [(rule, measured[rule.measure]) for rule in rules if rule.measure in measured and index > rule.after_rounds]
    return tuple(Decision(rule, value) for rule, value in known if rule.holds(value))


def loss_after(loss: LossBlock, decisions: Sequence[Decision]) -> LossBlock:
    """`loss` once all of the decisions were made."""
    for decision in decisions:
        if isinstance(decision.rule, RaiseRule):
            loss = raised(loss, decision.rule)
    return loss


def guarded(config: C, loss: LossBlock, decisions: Sequence[Decision]) -> C:
    """`config` with `loss`, its own, as it trains by it once all of the decisions were made."""
    return config.model_copy(update={"loss": loss_after(loss, decisions)})


def best_version(block: ChoiceBlock, measured: Sequence[Measures]) -> Best | None:
    """The best of the versions by `metric_for_best_model`, the earliest of equals; None where none was measured.

    `waited` counts as transformers' EarlyStoppingCallback does: a version that beats the best before it by more than
    `early_stopping_threshold` begins anew. The policy before training is one of them.
    """
    best: Best | None = None
    for version, own in enumerate(measured):
        value = own.get(block.metric_for_best_model or "")
        if value is None:
            continue
        gain = 0.0 if best is None else (value - best.value) * (1 if block.greater_is_better else -1)
        waited = 0 if best is None or gain > block.early_stopping_threshold else best.waited + 1
        best = Best(version, value, waited) if best is None or gain > 0 else Best(best.version, best.value, waited)
    return best


def ended_early(
    rules: Sequence[GuardRule], choice: ChoiceBlock | None, newest: Sequence[Decision], measured: Sequence[Measures]
) -> str | None:
    """Why a run does not go on after its newest round, whose decisions are `newest`; None where it does.

    A stop by a rule that is no longer among `rules` is lifted.
    """
    for decision in newest:
        if isinstance(decision.rule, StopRule) and decision.rule in rules:
            return f"guard: {decision.rule.measure} is {decision.value:.4g}, {decision.rule.bound}"
    if choice is None or choice.early_stopping_patience is None:
        return None
    best = best_version(choice, measured)
    if best is None or best.waited < choice.early_stopping_patience:
        return None
    return (
        f"early stopping: {choice.metric_for_best_model} was best after round {best.version} ({best.value:.4g}), "
        f"{best.waited} round(s) ago (evaluation.early_stopping_patience={choice.early_stopping_patience})"
    )


def over_optimisation(versions: Sequence[AnyEvaluation]) -> list[str]:
    """Of all versions, from the one before training on: the score rose since the best gold score, which has fallen.

    Fallen means below the lower bound of that best one: less may be chance. Nothing is said without a gold scorer.
    """
    known = [(version, own) for version, own in enumerate(versions) if isinstance(own, Evaluation)]
    golds = [(version, own, own.gold) for version, own in known if own.gold is not None]
    if not golds:
        return []
    version, best, best_gold = max(golds, key=lambda entry: entry[2])
    _, last, gold = golds[-1]
    if best.gold_low is None or best.gold_high is None:
        return []
    if gold >= best.gold_low or last.score <= best.score:
        return []
    return [
        f"over-optimisation: since round {version} the score rose from {best.score:.3f} to {last.score:.3f} while the "
        f"gold score fell from {best_gold:.3f} [{best.gold_low:.3f}, {best.gold_high:.3f}] to {gold:.3f}: the "
        f"policy exploits its scorer; read the samples, and take version {version} or raise loss.beta"
    ]
