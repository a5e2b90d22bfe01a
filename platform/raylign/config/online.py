"""The tree of the online recipe, with the rules that span its blocks. What they refuse is a ValueError."""

from collections.abc import Mapping
from typing import Self

from pydantic import model_validator

from raylign.config.blocks import (
    GeneratorsBlock,
    ModelBlock,
    PromptsBlock,
    SamplingBlock,
    ScheduleBlock,
    WeightSyncBlock,
)
from raylign.config.capability import CapabilityBlock
from raylign.config.evaluation import GOLD, EvaluationBlock
from raylign.config.guard import GuardRule, GuardUnion, asked_for, require_measured, require_raisable
from raylign.config.losses import LossBlock, LossUnion, SigmoidLossBlock, TrainerLoss
from raylign.config.pairing import (
    BestWorstPairingBlock,
    GroupPairingBlock,
    PairingBlock,
    PairingUnion,
    PolicyReferencePairingBlock,
    RankingPairingBlock,
)
from raylign.config.reference import (
    InitialReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    ReferenceUnion,
    SamplerReferenceBlock,
    require_reference,
)
from raylign.config.scoring import (
    FunctionScoringBlock,
    LeafBlock,
    MeanStdScoringBlock,
    ScoringBlock,
    ScoringUnion,
    by_part,
    leaves,
)
from raylign.config.tree import RunConfig


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


class OnlineDpoConfig(RunConfig):
    """Rounds of sampling, scoring and training. Pass its blocks to functions, never the tree."""

    recipe: str = "online_dpo"
    prompts: PromptsBlock = PromptsBlock()
    sampling: SamplingBlock = SamplingBlock()
    scoring: ScoringUnion = FunctionScoringBlock()
    pairing: PairingUnion = BestWorstPairingBlock()
    loss: LossUnion = SigmoidLossBlock()
    reference: ReferenceUnion = InitialReferenceBlock()
    generators: GeneratorsBlock = GeneratorsBlock()
    schedule: ScheduleBlock = ScheduleBlock()
    evaluation: EvaluationBlock = EvaluationBlock()
    guard: tuple[GuardUnion, ...] = ()
    """Rules that are looked at after every round; what they raise holds from the next round on."""

    @property
    def rounds(self) -> int:
        return self.schedule.rounds

    @property
    def objective(self) -> TrainerLoss:
        return self.loss

    @property
    def measured_against(self) -> ReferenceBlock:
        return self.reference

    @property
    def source(self) -> tuple[str, str]:
        return "prompts.source", self.prompts.source

    @property
    def longest(self) -> tuple[str, int]:
        return "generators.max_model_len", self.generators.max_model_len

    @property
    def capability(self) -> CapabilityBlock | None:
        return self.evaluation.capability

    @property
    def confidence(self) -> float:
        return self.evaluation.confidence

    @property
    def max_completion_tokens(self) -> int | None:
        return self.sampling.max_new_tokens

    @property
    def on_policy(self) -> bool:
        return True

    @property
    def scores_by_model(self) -> bool:
        return any(leaf.is_model for leaf in self.scorers)

    @property
    def scored_by(self) -> Mapping[str, ScoringBlock]:
        """By the option that describes each: who scores candidates, and the gold scorer if there is one."""
        gold = self.evaluation.gold
        return {"scoring": self.scoring} | ({} if gold is None else {GOLD: gold})

    @property
    def scorers(self) -> list[LeafBlock]:
        """Every scorer that is no composition, those of the gold scorer last."""
        return [leaf for block in self.scored_by.values() for leaf in leaves(block)]

    @property
    def rules(self) -> tuple[GuardRule, ...]:
        return self.guard

    @property
    def choice(self) -> EvaluationBlock | None:
        return None if self.evaluation.metric_for_best_model is None else self.evaluation

    @property
    def scored_parts(self) -> Mapping[str, ScoringBlock]:
        gold = self.evaluation.gold
        return by_part(self.scoring) | ({} if gold is None else by_part(gold, GOLD))

    @model_validator(mode="after")
    def completions_leave_room_for_a_prompt(self) -> Self:
        self.generators.require_room_for_a_prompt("sampling.max_new_tokens", self.sampling.max_new_tokens)
        return self

    @model_validator(mode="after")
    def lora_transport_needs_an_adapter(self) -> Self:
        if self.generators.weight_sync.transport == "lora" and self.model.lora is None:
            raise ValueError("generators.weight_sync.transport=lora needs model.lora; add that block or use auto")
        return self

    @model_validator(mode="after")
    def the_loss_gets_the_reference_it_reads(self) -> Self:
        require_reference(self.loss, self.reference)
        return self

    @model_validator(mode="after")
    def four_bits_are_served_merged(self) -> Self:
        if self.model.load_in_4bit and self.generators.weight_sync.transport == "lora":
            raise ValueError(
                "generators.weight_sync.transport=lora would serve the adapter on the 16-bit base, not on the 4-bit "
                "base it is trained on; use auto, shm or nccl with model.load_in_4bit"
            )
        return self

    @model_validator(mode="after")
    def the_generators_can_answer_as_the_reference(self) -> Self:
        require_served_reference(self.sampling, self.reference, self.model, self.generators.weight_sync)
        return self

    @model_validator(mode="after")
    def samples_of_the_reference_are_there_where_they_are_read(self) -> Self:
        require_reference_samples(self.sampling, self.reference, self.pairing, self.loss)
        return self

    @model_validator(mode="after")
    def samples_of_the_policy_are_there_where_they_are_read(self) -> Self:
        require_policy_samples(self.sampling, self.pairing, self.loss)
        return self

    @model_validator(mode="after")
    def kl_is_not_weighed_by_score(self) -> Self:
        if self.loss.needs_kl_gradient and self.pairing.weights != "none":
            raise ValueError(
                f"pairing.weights={self.pairing.weights} would weigh the term kl by score, and it is a mean over "
                "samples of the policy whatever their score; set pairing.weights=none, or leave kl out"
            )
        return self

    @model_validator(mode="after")
    def tensor_parallel_engines_have_their_own_devices(self) -> Self:
        width = self.generators.tensor_parallel_size
        if width > 1 and self.placement.mode == "colocated":
            raise ValueError(
                f"generators.tensor_parallel_size={width} needs whole devices; set placement.mode=disaggregated"
            )
        return self

    @model_validator(mode="after")
    def a_judge_rates_held_out_completions_alone(self) -> Self:
        count, gold = self.evaluation.num_generations, self.evaluation.gold
        if count > 1 and (self.scoring.compares or (gold is not None and gold.compares)):
            raise ValueError(
                f"evaluation.num_generations={count} with a scorer that compares: completions of one prompt are "
                "compared with each other, and their mean is 1/2 however good they are; "
                "set evaluation.num_generations=1"
            )
        return self

    @model_validator(mode="after")
    def the_guard_finds_what_it_reads_and_raises(self) -> Self:
        names = asked_for(self.guard, self.evaluation)
        adapter = self.model.lora is not None
        require_measured(names, self.evaluation, self.reference, self.loss, adapter=adapter)
        require_raisable(self.guard, self.loss)
        return self

    @model_validator(mode="after")
    def the_loss_reads_what_is_built(self) -> Self:
        if self.loss.pairs_only and not self.pairing.pairs:
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} compares two candidates, and pairing.type={self.pairing.type} "
                "gives whole lists; take pairs such as best_worst, or a loss of lists such as plackett_luce"
            )
        return self

    @model_validator(mode="after")
    def thresholds_read_the_scorers_own_score(self) -> Self:
        if self.pairing.length_penalty and self.loss.score_thresholds:
            raise ValueError(
                f"loss.{self.loss.score_thresholds[0]} would read scores less "
                f"pairing.length_penalty={self.pairing.length_penalty:g} a token, so that length decides what is "
                "desirable; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def the_scorer_gives_the_std_that_pairing_reads(self) -> Self:
        # A user's function can give one with its scores.
        if self.pairing.needs_std and not isinstance(self.scoring, MeanStdScoringBlock | FunctionScoringBlock):
            raise ValueError(
                f"pairing.optimism={self.pairing.optimism:g} and pairing.weights={self.pairing.weights} need an "
                f"ensemble's std, which scoring.type={self.scoring.type} does not give; set scoring.type=mean_std, or "
                "set optimism=0 and weights=none"
            )
        return self

    @property
    def max_preferences_per_round(self) -> int:
        """What a round gives to train on, at most."""
        return self.schedule.prompts_per_round * self.pairing.most(self.sampling.max_generations)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.generators.max_model_len - self.sampling.max_new_tokens
