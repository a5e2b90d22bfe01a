"""Scores from a language model that judges."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from raylign.config.base import Block
from raylign.config.blocks import Fraction

_VARIABLE_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


class JudgeScoringBlock(Block):
    """Scores from a language model behind an OpenAI-compatible endpoint: a vLLM server, OpenAI, ... .

    The candidates of one prompt are compared in pairs, in both orders: a score is a share of wins in 0..1. A candidate
    that stands alone (held-out evaluation) is rated from 1 to 10, mapped to 0..1. The two scales do not compare.
    """

    type: Literal["judge"] = "judge"
    base_url: str
    """Address of the server up to and with `/v1`; no credentials in it."""
    model: str = Field(min_length=1)
    """Name of the judge as the server knows it."""
    api_key_env: str = "OPENAI_API_KEY"
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

    @field_validator("base_url")
    @classmethod
    def base_url_is_an_address_without_credentials(cls, base_url: str) -> str:
        if "@" in base_url or "?" in base_url or "#" in base_url:
            raise ValueError(
                "an address with credentials or a query would be saved with the run; end it at /v1 and put the key in "
                "the environment variable that scoring.api_key_env names"
            )
        if not base_url.isprintable() or " " in base_url or not _is_http(base_url):
            raise ValueError(f"{base_url!r} is not http(s)://host[:port]/path, for example http://127.0.0.1:8000/v1")
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def api_key_env_is_the_name_of_a_variable(cls, name: str) -> str:
        if not name or name[0].isdigit() or not set(name) <= _VARIABLE_CHARACTERS:
            # The value may be the key itself.
            raise ValueError(
                "not the name of an environment variable (capital letters, digits, underscores); put the key in a "
                "variable and its name here"
            )
        return name


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
