"""From scored candidates to preferences."""

from raylign.pairing.build import PairingResult, build_preferences, require_preferences, without_pair
from raylign.pairing.groups import Group, group_by_prompt
from raylign.pairing.kl_samples import with_mismatched, with_policy_samples

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
