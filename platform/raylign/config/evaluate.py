"""The tree of the recipe that compares policies: nothing is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from raylign.config.base import Block
from raylign.config.blocks import (
    GeneratorsBlock,
    ModelBlock,
    PartBlock,
    PromptsBlock,
    RunBlock,
    RunName,
    TrainerBlock,
)
from raylign.config.losses import SigmoidLossBlock, TrainerLoss
from raylign.config.reference import NoReferenceBlock, ReferenceBlock
from raylign.config.scoring import FunctionScoringBlock, ScoringUnion, asks_people, leaves
from raylign.config.tree import RunConfig


class RunSideBlock(Block):
    """The policy of a run."""

    type: Literal["run"] = "run"
    run: Path
    """The run directory."""
    version: NonNegativeInt | None = None
    """Policy version; 0 is the model before training, null the newest that has a checkpoint."""


class ModelSideBlock(Block):
    """A model as it is."""

    type: Literal["model"] = "model"
    path: str = "embedded:smollm2-135m"
    """As `model.path`: `embedded:smollm2-135m`, a folder such as `raylign export` writes, or a hub id."""
    revision: str | None = None
    """Hub revision; pin it for repeatable evaluations."""


class AnswersSideBlock(Block):
    """Answers that somebody has given."""

    type: Literal["answers"] = "answers"
    source: Path | None = None
    """A .json or .jsonl file whose rows have the prompt and the answer, or a model's answers as AlpacaEval
    (`model_outputs.json`) and Arena-Hard (`model_answer/*.jsonl`) publish them; null takes the answers beside the
    prompts, in the rows of `prompts.source`."""
    column: str = "output"
    """Column with the answer."""


Side = RunSideBlock | ModelSideBlock | AnswersSideBlock
SideUnion = Annotated[Side, Field(discriminator="type")]


class EvaluatedPromptsBlock(PartBlock):
    """The prompts to answer, all of them. Files are read as AlpacaEval, Arena-Hard and IFEval publish them."""

    source: str = "embedded:review-topics"
    """`embedded:review-topics`, a .jsonl/.json/.parquet file, a `save_to_disk` folder, or a hub data set id."""
    column: str = "prompt"
    """Column with a string or a list of chat messages."""
    system: str | None = None
    """System message put before prompts that have none."""
    max_prompts: PositiveInt | None = None
    """How many to take, from the start; null takes all."""

    @property
    def rows(self) -> PromptsBlock:
        """The same for the reader of prompts."""
        return PromptsBlock(**self.model_dump(exclude={"max_prompts"}))


class ComparisonBlock(Block):
    """How answers are drawn and compared."""

    num_generations: PositiveInt = 1
    """Answers to each prompt by each side that is sampled; those of two sides are compared each with each."""
    max_new_tokens: PositiveInt = 512
    """Longest answer, in tokens."""
    temperature: NonNegativeFloat = 0.0
    """0 decodes greedily."""
    category: str | None = None
    """Column of the prompts' rows by which win rates are told apart: `dataset`, `category`, `cluster`."""
    bootstrap_samples: PositiveInt = 1000
    """Resamples for the interval of the mean score."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)


class EvaluateRunBlock(RunBlock):
    """`RunBlock` with a name of its own."""

    name: RunName = "evaluate"


class EvaluateConfig(RunConfig):
    """A policy, its opponents, prompts and a scorer.

    Of `model` sides of type `model` have dtype, chat template and trust; those of a run have the run's own.
    """

    recipe: str = "evaluate"
    run: EvaluateRunBlock = EvaluateRunBlock()
    policy: SideUnion = ModelSideBlock()
    opponents: Mapping[RunName, SideUnion] = Field({"initial": ModelSideBlock()}, min_length=1)
    prompts: EvaluatedPromptsBlock = EvaluatedPromptsBlock()
    scoring: ScoringUnion = FunctionScoringBlock()
    generators: GeneratorsBlock = GeneratorsBlock()
    evaluation: ComparisonBlock = ComparisonBlock()

    @property
    def rounds(self) -> int:
        return 0

    @property
    def objective(self) -> TrainerLoss:
        """Nobody trains."""
        return SigmoidLossBlock()

    @property
    def measured_against(self) -> ReferenceBlock:
        return NoReferenceBlock()

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
        return self.evaluation.max_new_tokens

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.generators.max_model_len - self.evaluation.max_new_tokens

    @property
    def scores_by_model(self) -> bool:
        return any(leaf.is_model for leaf in leaves(self.scoring))

    @model_validator(mode="after")
    def answers_leave_room_for_a_prompt(self) -> Self:
        self.generators.require_room_for_a_prompt("evaluation.max_new_tokens", self.evaluation.max_new_tokens)
        return self

    @model_validator(mode="after")
    def nobody_is_asked(self) -> Self:
        if asks_people(self.scoring):
            raise ValueError(
                "scoring of type human would never ask anybody here: people answer between the rounds of a run that "
                "samples; take another type, or ask them about a run's pairs with: raylign review send RUN"
            )
        return self

    @model_validator(mode="after")
    def a_judge_rates_the_policys_answers_alone(self) -> Self:
        count = self.evaluation.num_generations
        if count > 1 and self.scoring.compares:
            raise ValueError(
                f"evaluation.num_generations={count} with a scorer that compares: for its mean score each answer of "
                "the policy is rated alone, and those of one prompt would be compared; set evaluation.num_generations=1"
            )
        return self

    @model_validator(mode="after")
    def nothing_is_trained(self) -> Self:
        both = zip(self.trainer, TrainerBlock(), strict=True)
        if inert := [f"trainer.{name}" for (name, value), (_, default) in both if value != default]:
            raise ValueError(f"{', '.join(inert)}: nothing is trained here; remove it")
        if self.model.lora is not None or self.model.load_in_4bit:
            raise ValueError(
                "model.lora and model.load_in_4bit are for training, and nothing is trained here: the adapter of a run "
                "is found through policy.run; remove them"
            )
        if self.model.path != ModelBlock().path or self.model.revision is not None:
            raise ValueError(
                f"model.path={self.model.path}: whose answers are evaluated is said by policy and opponents; set "
                "policy={type: model, path: ...}"
            )
        return self
