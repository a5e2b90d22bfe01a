"""How an online run is evaluated, who scores beside its scorer, and by what any run's best version is chosen."""

from dataclasses import fields
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from raylign.config.base import Block
from raylign.config.capability import CapabilityBlock
from raylign.config.scoring import ScoringUnion, asks_people, is_calibrated
from raylign.records import Evaluation

MEASURED = tuple(field.name for field in fields(Evaluation) if field.type in (float, int, float | None))
"""Measures of one evaluation: its numbers."""
GOLD = "evaluation.gold"
"""The option of the gold scorer, and the part of a held-out completion's score that it gave; no member of a scorer can
have that name."""
LENGTH_GROWTH, GOLD_DROP, DISPLACEMENT = "length_growth", "gold_drop", "displacement"
MEASURES = (*MEASURED, LENGTH_GROWTH, GOLD_DROP, DISPLACEMENT)
"""What a version that samples can be judged by; `raylign.evaluation.guard.measures` says what the last three are."""
OF_ANSWERS = ("loss", "loss_low", "loss_high", "logps/chosen", "entropy", "mean_token_accuracy")
_ACCURACY = "rewards/accuracies"
OF_REWARDS = (
    *("loss", _ACCURACY, f"{_ACCURACY}_low", f"{_ACCURACY}_high"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins"),
)
OF_PAIRS = (*OF_REWARDS, "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", DISPLACEMENT)
"""What a version can be judged by on held-out rows of a data set, under TRL's names: answers, or pairs by a reward
model or a policy."""
_KNOWN = dict.fromkeys((*MEASURES, *OF_ANSWERS, *OF_PAIRS))


def _measure(name: str) -> str:
    if name not in _KNOWN:
        raise ValueError(f"{name!r} is no measure; take one of {', '.join(_KNOWN)}")
    return name


Measure = Annotated[str, AfterValidator(_measure)]


class ChoiceBlock(Block):
    """By what the best version of a run is chosen, and when the run ends without a better one."""

    metric_for_best_model: Measure | None = None
    """By which measure the best version is chosen, whose checkpoint is kept; null chooses none."""
    greater_is_better: bool = True
    """Whether that measure should be high; false for such as loss, kl or seq_rep_4."""
    early_stopping_patience: PositiveInt | None = None
    """The run ends after so many rounds in a row without a better version; null never ends it early."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """How much better than the best so far counts as better for that."""

    @model_validator(mode="after")
    def a_loss_should_be_low(self) -> Self:
        if self.metric_for_best_model == "loss" and self.greater_is_better:
            raise ValueError("metric_for_best_model=loss: the lower it is, the better; set greater_is_better=false")
        return self

    @model_validator(mode="after")
    def stopping_early_needs_a_measure(self) -> Self:
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if patience is not None and self.metric_for_best_model is None:
            raise ValueError(
                f"early_stopping_patience={patience} needs a measure to wait for; set metric_for_best_model, such as "
                "score or gold, or on a data set loss or rewards/accuracies"
            )
        if threshold and patience is None:
            raise ValueError(
                f"early_stopping_threshold={threshold:g} says nothing without early_stopping_patience; set that, or "
                "leave the threshold out"
            )
        return self


class EvaluationBlock(ChoiceBlock):
    """Held-out evaluation before round 1 and after every round."""

    num_generations: PositiveInt = 1
    """Completions per held-out prompt."""
    temperature: NonNegativeFloat = 1.0
    """0 decodes greedily; 1 keeps the KL estimate unbiased."""
    bootstrap_samples: PositiveInt = 1000
    """Resamples for the interval of the mean score."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    samples: NonNegativeInt = 3
    """Held-out completions kept per round for people to read."""
    win_rate: tuple[Literal["initial", "previous_round"], ...] = ("initial", "previous_round")
    """Whom each version is compared with, prompt by prompt, by the scores that its completions have anyway: the policy
    before round 1, and that of the round before; [] leaves it out."""
    capability: CapabilityBlock | None = None
    """What the policy still knows beside what it is trained for; null measures none of it."""
    gold: ScoringUnion | None = None
    """A second scorer, of held-out completions alone: no round trains on it. Where the score rises and this one falls,
    the policy exploits its scorer (Gao et al. 2023, arXiv 2210.10760). It runs beside `scoring`, in the same actor."""

    @model_validator(mode="after")
    def the_gold_scorer_asks_nobody(self) -> Self:
        if self.gold is not None and asks_people(self.gold):
            raise ValueError(
                "gold of type human would never ask anybody: people compare candidates, and the gold scorer gets "
                "held-out completions; take another type, such as a judge"
            )
        if self.gold is not None and is_calibrated(self.gold):
            raise ValueError(
                "gold of type calibrated would be its scorer alone: slope and band decide between candidates, and the "
                "gold scorer gets completions one by one; set gold to that scorer"
            )
        return self
