"""The configuration trees: strict, frozen, torch-free. YAML recipes and dotted overrides become a RunConfig."""

from raylign.config.evaluate import EvaluateConfig
from raylign.config.load import RECIPES, dump_config, import_recipe, load_config, load_recipe, parse_config
from raylign.config.offline import OfflineConfig, OfflineDpoConfig, RewardModelConfig, SftConfig
from raylign.config.online import OnlineDpoConfig
from raylign.config.tree import RunConfig

__all__ = [
    "RECIPES",
    "EvaluateConfig",
    "OfflineConfig",
    "OfflineDpoConfig",
    "OnlineDpoConfig",
    "RewardModelConfig",
    "RunConfig",
    "SftConfig",
    "dump_config",
    "import_recipe",
    "load_config",
    "load_recipe",
    "parse_config",
]
