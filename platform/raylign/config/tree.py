"""The whole recipe as one tree, with the rules that span blocks."""

from typing import Self

from pydantic import model_validator

from raylign.config.base import Block
from raylign.config.blocks import (
    BestWorstPairingBlock,
    EvaluationBlock,
    GeneratorsBlock,
    ModelBlock,
    PlacementBlock,
    PromptsBlock,
    RecoveryBlock,
    RunBlock,
    SamplingBlock,
    ScheduleBlock,
    TrackingBlock,
    TrainerBlock,
)
from raylign.config.losses import LossUnion, SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock, NoReferenceBlock, ReferenceUnion
from raylign.config.scoring import FunctionScoringBlock, JudgeScoringBlock, ScoringUnion, leaves


class RunConfig(Block):
    """One recipe. Pass its blocks to functions, never the tree."""

    run: RunBlock = RunBlock()
    model: ModelBlock = ModelBlock()
    prompts: PromptsBlock = PromptsBlock()
    sampling: SamplingBlock = SamplingBlock()
    scoring: ScoringUnion = FunctionScoringBlock()
    pairing: BestWorstPairingBlock = BestWorstPairingBlock()
    loss: LossUnion = SigmoidLossBlock()
    reference: ReferenceUnion = InitialReferenceBlock()
    trainer: TrainerBlock = TrainerBlock()
    generators: GeneratorsBlock = GeneratorsBlock()
    placement: PlacementBlock = PlacementBlock()
    recovery: RecoveryBlock = RecoveryBlock()
    schedule: ScheduleBlock = ScheduleBlock()
    evaluation: EvaluationBlock = EvaluationBlock()
    tracking: TrackingBlock = TrackingBlock()

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
    def four_bits_need_an_adapter(self) -> Self:
        if not self.model.load_in_4bit:
            return self
        if self.model.lora is None:
            raise ValueError("model.load_in_4bit needs model.lora: 4-bit weights cannot be trained")
        if self.trainer.zero_stage == 3:
            raise ValueError("model.load_in_4bit cannot be sharded by trainer.zero_stage=3; use 0, 1 or 2")
        if self.generators.weight_sync.transport == "lora":
            raise ValueError(
                "generators.weight_sync.transport=lora would serve the adapter on the 16-bit base, not on the 4-bit "
                "base it is trained on; use auto, shm or nccl with model.load_in_4bit"
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
    def offload_needs_zero(self) -> Self:
        stage, offload = self.trainer.zero_stage, self.trainer.offload
        if offload.param and stage != 3:
            raise ValueError(f"trainer.offload.param needs trainer.zero_stage=3, not {stage}")
        if offload.optimizer and stage == 0:
            raise ValueError("trainer.offload.optimizer needs trainer.zero_stage 1, 2 or 3, not 0")
        return self

    @model_validator(mode="after")
    def a_judge_rates_held_out_completions_alone(self) -> Self:
        count = self.evaluation.num_generations
        if count > 1 and any(isinstance(leaf, JudgeScoringBlock) for leaf in leaves(self.scoring)):
            raise ValueError(
                f"evaluation.num_generations={count} with a scorer of type judge: completions of one prompt are "
                "compared with each other, and their mean is 1/2 however good they are; "
                "set evaluation.num_generations=1"
            )
        return self

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.generators.max_model_len - self.sampling.max_new_tokens
