"""Which rules a config may have: what it cannot measure or raise is refused, with the cure."""

import pytest
import yaml

from raylign.config import (
    OfflineConfig,
    OfflineDpoConfig,
    RewardModelConfig,
    SftConfig,
    dump_config,
    parse_config,
)
from raylign.config.guard import RaiseRule, StopRule
from raylign.config.load import overridden, parse_tree
from raylign.errors import ConfigError

GOLD = "evaluation.gold={type: function, function: 'raylign.scoring.vader:compound'}"
SIMPO = ("loss={loss_type: simpo}", "reference.policy=none")
GRPO = ("loss={loss_type: grpo, beta: 0.1}", "pairing.type=group")
KL_MIX = "loss={loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: kl}], loss_weights: [1, 0.1]}"


def rule(measure: str = "score", action: str = "warn", more: str = "above: 1") -> str:
    return f"guard=[{{measure: {measure}, {more}, action: {action}}}]"


def test_rules_come_back_as_they_were() -> None:
    first = "{measure: kl, above: 1, action: raise_beta, factor: 3}"
    second = "{measure: entropy, below: 0.5, action: stop, after_rounds: 2}"
    config = parse_config({}, [f"guard=[{first}, {second}]"])
    raising, stopping = config.guard
    assert isinstance(raising, RaiseRule) and raising.factor == 3 and raising.bound == "above 1"
    assert isinstance(stopping, StopRule) and stopping.after_rounds == 2 and stopping.bound == "below 0.5"
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config and again.rules == config.guard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((rule("klll"),), "'klll' is no measure; take one of score,"),
        ((rule(action="wran"),), "did you mean 'warn'"),
        ((rule(more="above: 1, factor: 2"),), "factor: unknown key"),
        ((rule(action="raise_beta", more="above: 1, factor: 1"),), "greater than 1"),
        ((rule(more="above: 1, below: 0"),), "both above and below; give one of them"),
        ((rule(more="after_rounds: 1"),), "neither above nor below; give one of them"),
        ((rule("gold_drop"),), "the measure gold_drop needs a gold scorer; set evaluation.gold"),
        ((rule("win_rate_low"), "evaluation.win_rate=[]"), "evaluation.win_rate leaves out; add initial"),
        (
            (rule("win_rate_previous"), "evaluation.win_rate=[initial]"),
            "evaluation.win_rate leaves out; add previous_round",
        ),
        ((rule("kl"), *SIMPO), "reference.policy=none keeps none to ask; take kl_initial"),
        ((rule("kl_initial"), "reference.policy=ema"), "set model.lora, or reference.policy=initial"),
        ((rule("displacement"), *SIMPO), "loss.loss_type=simpo does not log"),
        ((rule("displacement"), *GRPO), "loss.loss_type=grpo does not log"),
        ((rule(action="raise_beta"), *SIMPO), "loss.loss_type=simpo has no beta that ties"),
        ((rule(action="raise_beta"), *GRPO), "take action=raise_kl"),
        ((rule(action="raise_kl"),), "loss.loss_type=sigmoid has no KL term; add one"),
        ((rule(action="raise_kl"), "loss={loss_type: grpo}", "pairing.type=group"), "grpo has no KL term"),
        ((rule("rewards/margins"),), "the recipe online_dpo does not measure rewards/margins; take one of score,"),
        (("evaluation.metric_for_best_model=gold",), "the measure gold needs a gold scorer"),
        (("evaluation.gold={type: human}",), "people compare candidates, and the gold scorer gets"),
        (("evaluation.early_stopping_patience=2",), "set metric_for_best_model"),
        (("evaluation={metric_for_best_model: score, early_stopping_threshold: 0.1}",), "early_stopping_patience"),
        (
            ("evaluation={num_generations: 2, gold: {type: judge, base_url: 'https://judge/v1', model: m}}",),
            "set evaluation.num_generations=1",
        ),
    ],
)
def test_what_does_not_work_is_refused_with_the_cure(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({}, options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        (rule("gold_drop", "stop"), GOLD),
        (rule("kl_initial_per_token"), "reference.policy=ema", "model.lora={r: 8}"),
        (rule("displacement"), "reference.policy=sampler"),
        (rule("win_rate_high", "stop"), "evaluation.win_rate=[initial]"),
        (rule(action="raise_kl"), KL_MIX),
        (rule(action="raise_beta"), KL_MIX),
        (rule(action="raise_kl"), *GRPO),
        (rule(action="raise_beta"), "loss={loss_type: function, function: 'a:b'}"),
        ("evaluation={metric_for_best_model: seq_rep_4, greater_is_better: false, early_stopping_patience: 2}",),
    ],
)
def test_what_works_is_taken(options: tuple[str, ...]) -> None:
    parse_config({}, options)


DATA = {"data": {"source": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            OfflineDpoConfig,
            (rule("gold_drop"),),
            "the recipe offline_dpo does not measure gold_drop; take one of loss,",
        ),
        (SftConfig, (rule("rewards/margins"),), "the recipe sft does not measure rewards/margins; take one of loss,"),
        (RewardModelConfig, (rule("displacement"),), "the recipe reward_model does not measure displacement"),
        (OfflineDpoConfig, (rule("displacement"), *SIMPO), "loss.loss_type=simpo does not log"),
        (OfflineDpoConfig, (rule("loss", "raise_beta"), *SIMPO), "loss.loss_type=simpo has no beta that ties"),
        (SftConfig, (rule("loss", "raise_beta"),), "loss.loss_type=sft has no beta that ties"),
        (RewardModelConfig, (rule("loss", "raise_beta"),), "loss.loss_type=bradley_terry has no beta that ties"),
        (OfflineDpoConfig, ("evaluation.metric_for_best_model=loss",), "set greater_is_better=false"),
        (SftConfig, ("evaluation.early_stopping_patience=2",), "set metric_for_best_model"),
    ],
)
def test_what_a_run_on_a_data_set_cannot_measure_is_refused(
    kind: type[OfflineConfig], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_tree(overridden(DATA, options), kind, "config")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OfflineDpoConfig, (rule("displacement", "raise_beta"), "evaluation.metric_for_best_model=rewards/accuracies")),
        (OfflineDpoConfig, (rule("rewards/chosen", "stop", "below: -5"),)),
        (
            SftConfig,
            ("evaluation={metric_for_best_model: loss, greater_is_better: false, early_stopping_patience: 1}",),
        ),
        (RewardModelConfig, (rule("rewards/accuracies_high", "stop", "below: 0.5"),)),
    ],
)
def test_what_a_run_on_a_data_set_measures_is_taken(kind: type[OfflineConfig], options: tuple[str, ...]) -> None:
    config = parse_tree(overridden(DATA, options), kind, "config")
    assert config.rules or config.choice
    assert parse_tree(yaml.safe_load(dump_config(config)), kind, "config") == config


def test_the_gold_scorer_counts_among_the_scorers() -> None:
    config = parse_config({}, ["evaluation.gold={type: reward_model, path: here}"])
    assert [leaf.type for leaf in config.scorers] == ["function", "reward_model"] and config.scores_by_model
