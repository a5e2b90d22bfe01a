"""What every scorer that is no composition shares: its place, its cache, addresses and keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from raylign.config.base import Block

CacheOption = Path | Literal["run"] | None
"""`run`: scores.sqlite of the run directory. A path: that file, which runs may share. null: nothing is kept."""


class LeafScoringBlock(Block):
    """A scorer of its own."""

    module: ClassVar[str]
    """That of `raylign.scoring` with all that is particular to this type, as `KIND`."""
    if TYPE_CHECKING:  # each type has a default of its own
        batch_size: int

    is_model: ClassVar[bool] = False
    """Whether it is a checkpoint that torch computes."""
    is_judge: ClassVar[bool] = False
    """Whether a language model is asked what it thinks."""
    compares: ClassVar[bool] = False
    """Whether a score depends on the other candidates of the prompt, so that more of them make it another score."""

    @property
    def title(self) -> str:
        """Who scores, in a few words."""
        raise NotImplementedError

    @property
    def items_per_call(self) -> int:
        """Items in one call that keep it busy."""
        return self.batch_size


_VARIABLE_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def _variable_name(name: str) -> str:
    if not name or name[0].isdigit() or not set(name) <= _VARIABLE_CHARACTERS:
        # The value may be the key itself.
        raise ValueError(
            "not the name of an environment variable (capital letters, digits, underscores); put the key in a "
            "variable and its name here"
        )
    return name


VariableName = Annotated[str, AfterValidator(_variable_name)]


def checked_address(address: str, ending: str, example: str) -> str:
    """`address` if it is http(s) without credentials, which would be saved with the run. Raises ValueError."""
    if "@" in address or "?" in address or "#" in address:
        raise ValueError(
            f"an address with credentials or a query would be saved with the run; end it at {ending} and put the key "
            "in the environment variable that scoring.api_key_env names"
        )
    if not address.isprintable() or " " in address or not _is_http(address):
        raise ValueError(f"{address!r} is not http(s)://host[:port]/path, for example {example}")
    return address


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
