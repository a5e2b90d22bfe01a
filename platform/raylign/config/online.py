"""The tree of the online recipe, with the rules that span its blocks."""

from typing import Literal, Self

from pydantic import model_validator

from raylign.config.blocks import (
    BestWorstPairingBlock,
    EvaluationBlock,
    GeneratorsBlock,
    PromptsBlock,
    SamplingBlock,
    ScheduleBlock,
)
from raylign.config.losses import KtoLossBlock, LossUnion, MixLossBlock, SigmoidLossBlock
from raylign.config.reference import (
    InitialReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceUnion,
    SamplerReferenceBlock,
)
from raylign.config.scoring import FunctionScoringBlock, JudgeScoringBlock, ScoringUnion
from raylign.config.tree import RunConfig


class OnlineDpoConfig(RunConfig):
    """Rounds of sampling, scoring and training. Pass its blocks to functions, never the tree."""

    recipe: Literal["online_dpo"] = "online_dpo"
    prompts: PromptsBlock = PromptsBlock()
    sampling: SamplingBlock = SamplingBlock()
    scoring: ScoringUnion = FunctionScoringBlock()
    pairing: BestWorstPairingBlock = BestWorstPairingBlock()
    loss: LossUnion = SigmoidLossBlock()
    reference: ReferenceUnion = InitialReferenceBlock()
    generators: GeneratorsBlock = GeneratorsBlock()
    schedule: ScheduleBlock = ScheduleBlock()
    evaluation: EvaluationBlock = EvaluationBlock()

    @property
    def samples_are_the_references(self) -> bool:
        """Whether the policy that samples a round is the round's reference."""
        return isinstance(self.reference, SamplerReferenceBlock | PreviousRoundReferenceBlock)

    @property
    def rounds(self) -> int:
        return self.schedule.rounds

    @model_validator(mode="after")
    def completions_leave_room_for_a_prompt(self) -> Self:
        limit, new = self.generators.max_model_len, self.sampling.max_new_tokens
        if new >= limit:
            raise ValueError(
                f"sampling.max_new_tokens={new} leaves no room for a prompt in generators.max_model_len={limit}; "
                "lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def lora_transport_needs_an_adapter(self) -> Self:
        if self.generators.weight_sync.transport == "lora" and self.model.lora is None:
            raise ValueError(
                "generators.weight_sync.transport=lora needs model.lora; add that block or use shm or nccl"
            )
        return self

    @model_validator(mode="after")
    def the_loss_gets_the_reference_it_reads(self) -> Self:
        if self.loss.needs_reference and isinstance(self.reference, NoReferenceBlock):
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} reads reference log-probs; "
                "set reference.policy=initial, or take a loss without reference such as simpo"
            )
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
        count, policy = self.sampling.reference_generations, self.reference.policy
        if not count:
            return self
        if self.samples_are_the_references:
            raise ValueError(
                f"sampling.reference_generations={count} with reference.policy={policy}: every candidate is a sample "
                "of that reference as it is; set sampling.reference_generations=0"
            )
        if policy != "initial":
            raise ValueError(
                f"sampling.reference_generations={count} with reference.policy={policy}: generators hold the policy "
                "and the initial model, not that reference; set reference.policy=initial"
            )
        if not self.model.adapter_fits_checkpoint:
            raise ValueError(
                f"sampling.reference_generations={count}: generators can answer as the initial model only where an "
                "adapter on it in 16 or 32 bits is the policy; set model.lora and model.load_in_4bit=false, or "
                "reference.policy=previous_round and sampling.reference_generations=0"
            )
        return self

    @model_validator(mode="after")
    def the_reference_is_served_apart(self) -> Self:
        count, transport = self.sampling.reference_generations, self.generators.weight_sync.transport
        if count and transport not in ("auto", "lora"):
            raise ValueError(
                f"generators.weight_sync.transport={transport} merges the adapter into the model that "
                f"sampling.reference_generations={count} asks for; use auto or lora"
            )
        return self

    @model_validator(mode="after")
    def the_bonus_has_samples_of_the_reference(self) -> Self:
        if not self.loss.needs_reference_samples or self.samples_are_the_references:
            return self
        if not self.sampling.reference_generations:
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} has xpo, a bonus on samples of the reference, and "
                f"reference.policy={self.reference.policy} answers no prompt; set sampling.reference_generations=1 "
                "with reference.policy=initial, or reference.policy=previous_round"
            )
        return self

    @model_validator(mode="after")
    def kto_estimates_its_kl_on_samples_of_the_policy(self) -> Self:
        members = self.loss.losses if isinstance(self.loss, MixLossBlock) else (self.loss,)
        count = self.sampling.reference_generations
        if count and any(isinstance(member, KtoLossBlock) for member in members):
            raise ValueError(
                f"sampling.reference_generations={count} with kto: its KL is the mean log-ratio of all candidates, "
                "which must be samples of the policy; set it to 0, or take another loss"
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
        count = self.evaluation.num_generations
        if isinstance(self.scoring, JudgeScoringBlock) and count > 1:
            raise ValueError(
                f"evaluation.num_generations={count} with scoring.type=judge: completions of one prompt are compared "
                "with each other, and their mean is 1/2 however good they are; set evaluation.num_generations=1"
            )
        return self

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.generators.max_model_len - self.sampling.max_new_tokens
