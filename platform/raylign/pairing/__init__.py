"""From scored candidates to preferences."""

from raylign.pairing.build import PairingResult, build_preferences, require_preferences, without_pair
from raylign.pairing.kl_samples import with_mismatched, with_policy_samples
from raylign.pairing.usable import Group, group_by_prompt

__all__ = [
    "Group",
    "PairingResult",
    "build_preferences",
    "group_by_prompt",
    "require_preferences",
    "with_mismatched",
    "with_policy_samples",
    "without_pair",
]
