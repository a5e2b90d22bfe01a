"""Reference log-probs that a loss reads must be there: zeros in their place would train on something else."""

from collections.abc import Sequence

from raylign.config.losses import TrainerLoss
from raylign.errors import TrainerError
from raylign.records import Preference


def require_reference(preferences: Sequence[Preference], loss: TrainerLoss) -> None:
    """Raises TrainerError when `loss` reads reference log-probs that a preference does not have."""
    for index, preference in enumerate(preferences if loss.needs_reference else ()):
        found, wanted = len(preference.reference_logps), len(preference.candidates)
        if found != wanted:
            raise TrainerError(
                f"preference {index} (prompt {preference.prompt.id}) has {found} reference log-probs for {wanted} "
                f"candidates, and loss_type={loss.loss_type} reads them; fill them by with_reference"
            )
