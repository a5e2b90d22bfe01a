"""A loss of the user's."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveFloat

from raylign.config.losses.base import LossBase


class FunctionLossBlock(LossBase):
    """`function(logps, block, state) -> [G]`: a loss of yours, of what `raylign.losses.LossInput` holds.

    `logps.tokens` has the log-probs token by token; sums over each candidate are beside it. `state` is a
    `raylign.losses.LossState`. The mean over the groups of a step is minimised.
    """

    loss_type: Literal["function"] = "function"
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`, in the working directory or an installed package."""
    beta: PositiveFloat = 0.1
    """Scale of the logged rewards beta (log pi - log pi_ref); your function may read it."""
    options: Mapping[str, float] = {}
    """Numbers for your function to read."""
    pairs_only: bool = True  # type: ignore[misc]
    """Whether it takes pairs alone; false gives it whole lists."""
    needs_reference: bool = True  # type: ignore[misc]
    """Whether it reads the reference's log-probs."""
    needs_reference_tokens: bool = False  # type: ignore[misc]
    """Whether it reads them token by token, as `logps.tokens.reference`."""
    needs_samples: bool = False  # type: ignore[misc]
    """Whether it reads `logps.tokens.sampler` and `logps.tokens.old`: online only, at `sampling.temperature` 1."""
