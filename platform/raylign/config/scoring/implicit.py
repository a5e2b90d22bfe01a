"""Scores from the log-ratio of two language models."""

from typing import Literal

from pydantic import Field, PositiveFloat

from raylign.config.scoring.model import ModelScoringBlock


class ImplicitScoringBlock(ModelScoringBlock):
    """The implicit reward of DPO: beta (log pi(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    The partition term of eq. 5 is the same for all completions of a prompt and left out. Any two checkpoints with one
    tokenizer will do; a policy after DPO and the model it started from are a reward model for free.
    """

    type: Literal["implicit"] = "implicit"
    policy_path: str = Field(min_length=1)
    """pi: a local folder or a hub id, of a whole model or a PEFT adapter (CAUSAL_LM). Its tokenizer is used."""
    policy_revision: str | None = None
    """Hub revision of the policy."""
    reference_path: str = Field(min_length=1)
    """pi_ref, with the policy's tokenizer. The base of a policy's adapter is loaded once for both."""
    reference_revision: str | None = None
    """Hub revision of the reference."""
    beta: PositiveFloat = 0.1
    """Scale of the log-ratio, as in the loss."""
    length_normalised: bool = False
    """Divide by the completion's tokens, its end token included; the sum grows with length."""
