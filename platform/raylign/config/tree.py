"""The whole recipe as one tree, with the rules that span blocks."""

from typing import Self

from pydantic import model_validator

from raylign.config.base import Block
from raylign.config.blocks import (
    BestWorstPairingBlock,
    EvaluationBlock,
    FunctionScoringBlock,
    GeneratorsBlock,
    ModelBlock,
    PlacementBlock,
    PromptsBlock,
    ReferenceBlock,
    RunBlock,
    SamplingBlock,
    ScheduleBlock,
    SigmoidLossBlock,
    TrackingBlock,
    TrainerBlock,
)


class RunConfig(Block):
    """One recipe. Pass its blocks to functions, never the tree."""

    run: RunBlock = RunBlock()
    model: ModelBlock = ModelBlock()
    prompts: PromptsBlock = PromptsBlock()
    sampling: SamplingBlock = SamplingBlock()
    scoring: FunctionScoringBlock = FunctionScoringBlock()
    pairing: BestWorstPairingBlock = BestWorstPairingBlock()
    loss: SigmoidLossBlock = SigmoidLossBlock()
    reference: ReferenceBlock = ReferenceBlock()
    trainer: TrainerBlock = TrainerBlock()
    generators: GeneratorsBlock = GeneratorsBlock()
    placement: PlacementBlock = PlacementBlock()
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

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.generators.max_model_len - self.sampling.max_new_tokens
