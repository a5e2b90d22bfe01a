"""Scores from a language model that judges."""

from typing import ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raylign.config.blocks import Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock
from raylign.config.scoring.remote import VariableName, checked_address


class JudgeScoringBlock(LeafScoringBlock):
    """Scores from a language model behind an OpenAI-compatible endpoint: a vLLM server, OpenAI, ... .

    The candidates of one prompt are compared in pairs, in both orders: a score is a share of wins in 0..1. A candidate
    that stands alone (held-out evaluation) is rated from 1 to 10, mapped to 0..1. The two scales do not compare.
    """

    compares: ClassVar[bool] = True
    type: Literal["judge"] = "judge"
    base_url: str
    """Address of the server up to and with `/v1`; no credentials in it."""
    model: str = Field(min_length=1)
    """Name of the judge as the server knows it."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """Environment variable with the key, on the scorer's node; without that variable no key is sent."""
    criterion: str = Field(
        "The better answer does what the conversation asks for, and is correct, complete, clear and to the point.",
        min_length=1,
    )
    """What makes an answer better, in words."""
    temperature: NonNegativeFloat = 0.0
    """0 lets the judge answer greedily."""
    canaries: bool = True
    """Ask questions with known answers first; a judge that fails them is refused."""
    concurrency: PositiveInt = 8
    """Requests under way at once."""
    retries: NonNegativeInt = 2
    """Further tries of a request that failed or whose answer is no verdict."""
    timeout_s: PositiveFloat = 30.0
    """Deadline of one request in seconds; also the longest that a server may ask to wait (Retry-After)."""
    batch_size: PositiveInt = 32
    """Completions per call; those of one prompt stay together, even where they are more."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    price_in: NonNegativeFloat | None = None
    """US dollars per million tokens asked; with `price_out` it gives `cost_usd`."""
    price_out: NonNegativeFloat | None = None
    """US dollars per million tokens answered."""
    cache: CacheOption = "run"
    """Keeps every verdict: `run`, a path that runs may share, or null, which asks all of them again about a prompt that
    is sampled again. Above temperature 0 the first verdicts stay.
    """

    @field_validator("base_url")
    @classmethod
    def base_url_is_an_address_without_credentials(cls, base_url: str) -> str:
        return checked_address(base_url, "/v1", "http://127.0.0.1:8000/v1")

    @model_validator(mode="after")
    def a_cost_needs_both_prices(self) -> Self:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError(
                f"price_in={self.price_in} and price_out={self.price_out} give no cost; set both, or neither"
            )
        return self
