"""Where judged text comes from, and how it becomes training data."""

from typing import Literal

from pydantic import Field, PositiveInt

from raylign.config.blocks import ControlTokens, Fraction, PartBlock

Format = Literal["auto", "trl", "sharegpt", "alpaca", "hh", "helpsteer2", "ultrafeedback", "ultrafeedback_zh"]


class SourceBlock(PartBlock):
    """One source of judged text."""

    source: str
    """A .jsonl, .json (both also .gz) or .parquet file, a folder of .jsonl or .parquet files, a `save_to_disk` folder,
    or a hub data set id."""
    format: Format = "auto"
    """`auto` tells it from the columns; see `raylign.data.formats`."""
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    """ISO 639 code of every row; null reads the row's own, or detects it where it matters."""


class DataBlock(SourceBlock):
    """Preferences or demonstrations to train on. Held-out rows are never trained on."""

    held_out: PositiveInt = 64
    """Rows kept for evaluation, drawn by seed."""
    limit: PositiveInt | None = None
    """Rows to use at most, from the start; null uses all."""
    system: str | None = None
    """System message put before conversations that have none."""
    control_tokens: ControlTokens = "keep"
    """Tokens of the chat template such as `<|im_end|>` in the text of prompts: `keep` leaves them, `break_up` writes
    `< |im_end|>`. Answers stay as they are. Rows that have them, in prompt or answers, are counted."""
    max_length: PositiveInt = 1024
    """Longest prompt with one completion, in tokens."""
    truncation_mode: Literal["keep_start"] = "keep_start"
    """What stays of a longer one: its start. A row whose prompt alone is too long is left out, and counted."""
    max_invalid: Fraction = 0.0
    """Share of rows that may be bad and are then left out, listed in quarantine.jsonl; past it, no start."""
