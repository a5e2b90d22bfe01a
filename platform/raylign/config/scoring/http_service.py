"""Scores from a reward service over HTTP."""

from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from raylign.config.blocks import Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock
from raylign.config.scoring.remote import VariableName, checked_address


class HttpScoringBlock(LeafScoringBlock):
    """Scores from a reward service that takes a batch by POST.

    `protocol: raylign` sends {"prompts": [[messages]], "completions": [text], "labels": [value or null]} and reads
    {"scores": [number or null], "reasons": [text]}, of which the reasons may be left out. `openrlhf` sends
    {"query": [prompt and completion], "prompts": [text], "labels": [value or null]} and reads {"rewards": [number]}.
    """

    type: Literal["http"] = "http"
    url: str
    """Where to post; no credentials in it."""
    protocol: Literal["raylign", "openrlhf"] = "raylign"
    """What is sent and read."""
    chat_template: Path | None = None
    """`openrlhf` only: Jinja file that makes text of a prompt's messages; null puts a blank line between them."""
    label_column: str = "answer"
    """Column of the prompt's row that is sent as its label; null is sent for rows without it."""
    api_key_env: VariableName = "REWARD_API_KEY"
    """Environment variable with the key (sent as a bearer token), on the scorer's node; unset sends no key."""
    concurrency: PositiveInt = 4
    """Requests under way at once."""
    retries: NonNegativeInt = 2
    """Further tries of a request that failed in passing."""
    timeout_s: PositiveFloat = 60.0
    """Deadline of one request in seconds; also the longest that a server may ask to wait (Retry-After)."""
    batch_size: PositiveInt = 32
    """Completions per request."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion, label and url: `run`, a path that runs may share, or null."""

    @field_validator("url")
    @classmethod
    def url_is_an_address_without_credentials(cls, url: str) -> str:
        return checked_address(url, "the path", "http://127.0.0.1:5000/get_reward")

    @model_validator(mode="after")
    def messages_stay_messages_unless_the_protocol_wants_text(self) -> Self:
        if self.chat_template is not None and self.protocol != "openrlhf":
            raise ValueError(
                f"chat_template={self.chat_template} is for protocol=openrlhf; protocol={self.protocol} sends "
                "messages, so leave chat_template out"
            )
        return self
