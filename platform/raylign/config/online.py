"""The tree of the online recipe, with the rules that span its blocks."""

from typing import Self

from pydantic import model_validator

from raylign.config.blocks import (
    EvaluationBlock,
    GeneratorsBlock,
    PromptsBlock,
    SamplingBlock,
    ScheduleBlock,
)
from raylign.config.losses import LossUnion, SigmoidLossBlock, TrainerLoss
from raylign.config.pairing import BestWorstPairingBlock, PairingUnion
from raylign.config.reference import InitialReferenceBlock, ReferenceBlock, ReferenceUnion, require_reference
from raylign.config.samples import require_policy_samples, require_reference_samples, require_served_reference
from raylign.config.scoring import (
    FunctionScoringBlock,
    MeanStdScoringBlock,
    ScoringUnion,
    leaves,
)
from raylign.config.tree import RunConfig


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
        return any(leaf.is_model for leaf in leaves(self.scoring))

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
        count = self.evaluation.num_generations
        if count > 1 and self.scoring.compares:
            raise ValueError(
                f"evaluation.num_generations={count} with a scorer of type judge: completions of one prompt are "
                "compared with each other, and their mean is 1/2 however good they are; "
                "set evaluation.num_generations=1"
            )
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
