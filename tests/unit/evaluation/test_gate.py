"""Every condition of the gate, each on a record that violates it alone, and a record that violates none."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from raylign.config.guard import RaiseRule, StopRule, WarnRule
from raylign.evaluation.gate import Evidence, Facts, Refusal, refusals
from raylign.evaluation.guard import Decision
from raylign.records import Evaluation

BASELINE = Evaluation(0.2, 0.1, 0.3, 0.0, 40.0, 0.8, 0.6, 32, 0, gold=0.5, gold_low=0.4, gold_high=0.6)
AFTER = replace(BASELINE, score=0.6, gold=0.55)
WON = Evidence(0.7, 0.56, 0.81, 50, 0.95, "the initial policy", "held-out prompts of the run")
WARN = Decision(WarnRule(measure="kl", above=0.5, action="warn"), 0.7)
RAISE = Decision(RaiseRule(measure="kl", above=0.5, action="raise_beta"), 0.7)
STOP = Decision(StopRule(measure="kl", above=0.5, action="stop"), 0.7)


def refused(
    evidence: Evidence | Refusal = WON,
    decisions: Sequence[Decision] = (),
    after: Evaluation = AFTER,
    above: float = 0.5,
    tolerated: float = 0.0,
    before: Evaluation = BASELINE,
) -> list[str]:
    return [one.told for one in refusals(evidence, Facts(decisions, [before, after]), above, tolerated)]


def test_what_meets_every_condition_passes() -> None:
    same = {"arithmetic": 0.3, "arithmetic_change": 0.0, "arithmetic_change_low": -0.1, "arithmetic_change_high": 0.1}
    better = replace(AFTER, capability=same)
    assert refused(decisions=[WARN, RAISE], after=better) == []


@pytest.mark.parametrize(("low", "above", "passes"), [(0.5, 0.5, False), (0.501, 0.5, True), (0.56, 0.6, False)])
def test_the_lower_bound_is_above_the_limit_not_the_rate(low: float, above: float, passes: bool) -> None:
    told = refused(replace(WON, low=low), above=above)
    if passes:
        assert told == []
    else:
        (line,) = told
        assert line.startswith("win rate: 0.700 [") and f"lower bound {low:.3f} is not above {above:g}; " in line
        assert "(95 %) over the initial policy, on 50 held-out prompts" in line


def test_evidence_that_was_refused_refuses() -> None:
    own = Refusal("unused prompts", "0 are left", "evaluate")
    assert refused(own) == ["unused prompts: 0 are left; evaluate"]


def test_a_stop_rule_of_the_guard_refuses() -> None:
    (line,) = refused(decisions=[WARN, STOP])
    assert line.startswith("guard: kl is 0.7, above 0.5: the run ends here; ")


def test_a_score_that_rises_while_the_gold_score_falls_refuses() -> None:
    (line,) = refused(after=replace(AFTER, gold=0.39))
    assert line.startswith("gold score: over-optimisation: since round 0 the score rose")


@pytest.mark.parametrize(
    ("low", "high", "rises", "worse"),
    [
        (-0.3, -0.01, False, True),
        (-0.3, 0.0, False, False),
        (0.01, 0.3, False, False),
        (0.01, 0.3, True, True),
        (-0.3, -0.01, True, False),
        (0.0, 0.3, True, False),
    ],
)
def test_a_task_that_is_worse_beyond_its_interval_refuses(low: float, high: float, rises: bool, worse: bool) -> None:
    """Less of the right answers, or more perplexity, which has nats per token beside it."""
    found = {"own": 1.0, "own_change": (low + high) / 2, "own_change_low": low, "own_change_high": high}
    found |= {"own_nats_per_token": 2.0} if rises else {}
    told = refused(after=replace(AFTER, capability=found))
    assert bool(told) == worse
    if worse:
        assert f"own changed by {(low + high) / 2:+.4g} [{low:+.4g}, {high:+.4g}]" in told[0]
        assert (
            told[0].split(": ")[2].startswith("its lower bound is above +0" if rises else "its upper bound is below -0")
        )


@pytest.mark.parametrize(
    ("low", "high", "rises", "worse"),
    [
        (0.72, 1.01, True, False),  # of 33.79: within 5 %
        (1.70, 2.40, True, True),
        (-3.0, -1.68, False, False),
        (-3.0, -1.70, False, True),
    ],
)
def test_what_is_tolerated_is_a_share_of_what_it_was(low: float, high: float, rises: bool, worse: bool) -> None:
    change = (low + high) / 2
    found = {"own": 33.79 + change, "own_change": change, "own_change_low": low, "own_change_high": high}
    found |= {"own_nats_per_token": 3.5} if rises else {}
    told = refused(after=replace(AFTER, capability=found), tolerated=0.05)
    assert bool(told) == worse
    assert not told or "1.69, 5% of before" in told[0]


def test_a_version_that_was_not_measured_refuses_where_others_were() -> None:
    before = replace(BASELINE, capability={"arithmetic": 0.3})
    (line,) = refused(before=before)
    assert line.startswith("capability: it was measured before training and not of this version; take a version that")


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = {"own": 1.0, "own_change": -0.2, "own_change_low": -0.3, "own_change_high": -0.1}
    told = refused(replace(WON, low=0.4), [STOP], replace(AFTER, gold=0.3, capability=found))
    assert [line.split(":")[0] for line in told] == ["win rate", "guard", "gold score", "capability"]
