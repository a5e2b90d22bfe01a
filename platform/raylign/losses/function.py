"""Losses of users."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

from raylign.boundary.code import import_named
from raylign.config.losses.function import FunctionLossBlock
from raylign.errors import ConfigError
from raylign.losses.inputs import LossInput, LossState, loss_of


def own_loss(logps: LossInput, block: FunctionLossBlock, state: LossState) -> Tensor:
    """What the user's function gives. Raises ConfigError unless that is one value for each group."""
    losses = _function(block.function, Path.cwd())(logps, block, state)
    if not isinstance(losses, Tensor) or losses.shape != logps.policy.shape[:1]:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"loss.function={block.function} gave {shape} for {len(logps.policy)} groups; return a tensor [G]"
        )
    return losses


@cache
def _function(spec: str, project: Path) -> Callable[[LossInput, FunctionLossBlock, LossState], object]:
    """Found once for a project: looking where it may come from reads every installed package, at every micro-batch."""
    found = import_named(spec, "loss.function")
    if not callable(found):
        raise ConfigError(f"loss.function={spec} is a {type(found).__name__}, not a function")
    return found


LOSSES = loss_of(FunctionLossBlock, own_loss)
