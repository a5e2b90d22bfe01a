"""Rules on what is sampled, and of whom: who can serve it, and who reads it. All raise ValueError."""

from raylign.config.blocks import ModelBlock, SamplingBlock, WeightSyncBlock
from raylign.config.losses import LossBlock
from raylign.config.pairing import (
    GroupPairingBlock,
    PairingBlock,
    PolicyReferencePairingBlock,
    RankingPairingBlock,
)
from raylign.config.reference import (
    InitialReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)


def sampler_is_reference(block: ReferenceBlock) -> bool:
    """Whether the policy that samples a round is the round's reference."""
    return isinstance(block, SamplerReferenceBlock | PreviousRoundReferenceBlock)


def require_served_reference(
    sampling: SamplingBlock, reference: ReferenceBlock, model: ModelBlock, sync: WeightSyncBlock
) -> None:
    """Generators hold the initial model beside the policy only where that is an adapter on it, served as such."""
    count = sampling.reference_generations
    if not count:
        return
    asked = f"sampling.reference_generations={count}"
    if sampler_is_reference(reference):
        raise ValueError(
            f"{asked} with reference.policy={reference.policy}: every candidate is a sample of that reference as it "
            "is; set sampling.reference_generations=0"
        )
    if not isinstance(reference, InitialReferenceBlock):
        raise ValueError(
            f"{asked} with reference.policy={reference.policy}: generators hold the policy and the initial model, not "
            "that reference; set reference.policy=initial"
        )
    if not model.adapter_fits_checkpoint:
        raise ValueError(
            f"{asked}: generators can answer as the initial model only where the policy is an adapter on it, in 16 or "
            "32 bits; set model.lora and model.load_in_4bit=false, or reference.policy=previous_round and "
            "sampling.reference_generations=0"
        )
    if sync.transport not in ("auto", "lora"):
        raise ValueError(
            f"generators.weight_sync.transport={sync.transport} merges the adapter into the model that {asked} asks "
            "for; use auto or lora"
        )


def require_reference_samples(
    sampling: SamplingBlock, reference: ReferenceBlock, pairing: PairingBlock, loss: LossBlock
) -> None:
    """Who reads samples of the reference gets some, unchosen."""
    count, against = sampling.reference_generations, isinstance(pairing, PolicyReferencePairingBlock)
    if (against or loss.needs_reference_samples) and not (count or sampler_is_reference(reference)):
        reader = "pairing.type=policy_reference" if against else "xpo, a bonus in the loss,"
        raise ValueError(
            f"{reader} needs samples of the reference, and reference.policy={reference.policy} answers no prompt; set "
            "sampling.reference_generations=1 with reference.policy=initial, or reference.policy=previous_round"
        )
    if loss.needs_reference_samples:
        _require_unchosen(pairing)


def _require_unchosen(block: PairingBlock) -> None:
    """XPO's bonus is an expectation over the reference's samples, whatever their scores."""
    whole = isinstance(block, RankingPairingBlock) and block.max_candidates is None
    if not (whole or isinstance(block, GroupPairingBlock | PolicyReferencePairingBlock)):
        raise ValueError(
            f"pairing.type={block.type} chooses by score, and xpo's bonus is a mean over samples of the reference "
            "whatever their score; set pairing.type=policy_reference, or ranking (with max_candidates=null) for a loss "
            "of lists"
        )
    if block.weights != "none":
        raise ValueError(
            f"pairing.weights={block.weights} would weigh xpo's bonus by score too; set pairing.weights=none"
        )


def require_policy_samples(sampling: SamplingBlock, pairing: PairingBlock, loss: LossBlock) -> None:
    """Who weighs samples by their probability gets the policy's own, as it would sample them, and all of a prompt's."""
    if loss.needs_samples:
        _require_untouched(sampling, loss)
    if loss.needs_groups and not isinstance(pairing, GroupPairingBlock):
        raise ValueError(
            f"loss.loss_type={loss.loss_type} compares a candidate with the mean of its whole group, and "
            f"pairing.type={pairing.type} leaves some out; set pairing.type=group"
        )
    if loss.needs_groups and pairing.weights != "none":
        raise ValueError(
            f"pairing.weights={pairing.weights} would weigh the groups of loss.loss_type={loss.loss_type} by score "
            "once more; set pairing.weights=none"
        )


def _require_untouched(sampling: SamplingBlock, loss: LossBlock) -> None:
    """Log-probs are those at temperature 1 of the whole vocabulary; samples of anything else have others."""
    name = f"loss.loss_type={loss.loss_type} weighs samples by their probability under the policy"
    touched = {
        "temperature": (sampling.temperature, 1.0),
        "top_p": (sampling.top_p, 1.0),
        "top_k": (sampling.top_k, 0),
        "reference_generations": (sampling.reference_generations, 0),
    }
    for option, (value, plain) in touched.items():
        if value != plain:
            raise ValueError(f"{name}, and sampling.{option}={value:g} samples from another one; set it to {plain:g}")
