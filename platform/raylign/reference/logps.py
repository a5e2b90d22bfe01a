"""Reference log-probs that a loss reads must be there: zeros in their place would train on something else."""

from collections.abc import Sequence

from raylign.config.losses import TrainerLoss
from raylign.errors import TrainerError
from raylign.records import Preference


def require_reference(preferences: Sequence[Preference], loss: TrainerLoss) -> None:
    """Raises TrainerError when `loss` reads reference log-probs that a preference or its KL sample does not have."""
    for index, preference in enumerate(preferences if loss.needs_reference else ()):
        sample = preference.kl_sample
        if loss.needs_kl_sample and (sample is None or sample.reference_logp is None):
            raise TrainerError(
                f"preference {index} (prompt {preference.prompt.id}) has no KL sample with a reference log-prob, and "
                f"loss_type={loss.loss_type} reads it; fill it by raylign.pairing.kl_samples and with_reference"
            )
        found, wanted = len(preference.reference_logps), len(preference.candidates)
        if found != wanted:
            raise TrainerError(
                f"preference {index} (prompt {preference.prompt.id}) has {found} reference log-probs for {wanted} "
                f"candidates, and loss_type={loss.loss_type} reads them; fill them by with_reference"
            )
