"""The configuration tree: strict, frozen, torch-free. YAML recipes and dotted overrides become a RunConfig."""

from raylign.config.load import dump_config, load_config, parse_config
from raylign.config.tree import RunConfig

__all__ = ["RunConfig", "dump_config", "load_config", "parse_config"]
