"""The configuration trees: strict, frozen, torch-free. YAML recipes and dotted overrides become a RunConfig."""

from raylign.config.load import dump_config, load_config, load_recipe, parse_config
from raylign.config.offline import OfflineConfig, OfflineDpoConfig, RewardModelConfig, SftConfig
from raylign.config.online import OnlineDpoConfig
from raylign.config.tree import RunConfig

__all__ = [
    "OfflineConfig",
    "OfflineDpoConfig",
    "OnlineDpoConfig",
    "RewardModelConfig",
    "RunConfig",
    "SftConfig",
    "dump_config",
    "load_config",
    "load_recipe",
    "parse_config",
]
