"""From a recipe's tree to its script and its plan."""

from pathlib import Path

from rich.console import Console

from raylign.config import OfflineConfig, OfflineDpoConfig, OnlineDpoConfig, RewardModelConfig, RunConfig, SftConfig
from recipes import offline_dpo, online_dpo, reward_model, sft
from recipes.commands.plan import make_plan
from recipes.commands.plan_offline import make_offline_plan, show_offline_plan
from recipes.commands.plan_view import show_plan


def start(config: RunConfig) -> Path:
    """Run the recipe that `config` is of; returns the run directory."""
    match config:
        case OnlineDpoConfig():
            return online_dpo.main(config)
        case OfflineDpoConfig():
            return offline_dpo.main(config)
        case SftConfig():
            return sft.main(config)
        case RewardModelConfig():
            return reward_model.main(config)
        case _:
            raise AssertionError(f"recipe {config.recipe!r} has no script")


def show(config: RunConfig, console: Console) -> None:
    """What the recipe would run, starting nothing."""
    match config:
        case OnlineDpoConfig():
            show_plan(make_plan(config), console)
        case OfflineConfig():
            show_offline_plan(make_offline_plan(config), console)
        case _:
            raise AssertionError(f"recipe {config.recipe!r} has no plan")
