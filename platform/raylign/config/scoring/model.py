"""What scorers that run a model themselves have in common."""

from pathlib import Path

from pydantic import PositiveFloat, PositiveInt

from raylign.config.blocks import Dtype, Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock


class ModelScoringBlock(LeafScoringBlock):
    """A model in the scorer actor: on `placement.scorer_gpus`, else on the threads of `placement.scorer_cpus`."""

    dtype: Dtype = "bfloat16"
    """Compute dtype; rewards and log-probs themselves are float32."""
    chat_template: Path | None = None
    """Jinja file in place of the chat template in the model's folder; for models that come without one."""
    batch_size: PositiveInt = 16
    """Completions in one forward pass, at most."""
    max_tokens_per_batch: PositiveInt = 8192
    """Tokens in one forward pass, padding included, at most: memory. A longer completion goes alone."""
    max_length: PositiveInt | None = None
    """Tokens of prompt and completion, at most; null takes the positions of the model. Nothing is cut: what is longer
    stays unscored."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""
    timeout_s: PositiveFloat = 30.0
    """Deadline per completion in seconds; an actor that is past it for its whole batch is replaced."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion and the model's files: `run`, a path that runs may share, or null."""
