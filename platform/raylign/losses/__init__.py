"""Preference losses: pure functions, tensors in, unreduced losses and detached metrics out.

`raylign.config.losses` has one block per loss, with its equation; `preference_loss` takes any of them.
"""

from raylign.losses.inputs import LossInput, LossOutput, LossState, TokenLogps
from raylign.losses.preference import ld_weights, next_state, preference_loss, under_new_reference, wpo_weights

__all__ = [
    "LossInput",
    "LossOutput",
    "LossState",
    "TokenLogps",
    "ld_weights",
    "next_state",
    "preference_loss",
    "under_new_reference",
    "wpo_weights",
]
