"""The config of `raylign data prepare`: sources in, one clean and mixed preference file out."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raylign.config.base import Block
from raylign.config.blocks import Fraction, Seed
from raylign.config.data import SourceBlock

Attribute = Literal["correctness", "helpfulness", "coherence", "complexity", "verbosity"]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
SHARES_ERROR = 1e-6
TEMPLATES = (
    r"\bas an? (?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b",
    r"\bI(?:'m| am) (?:just |only )?an? AI(?: language)?(?: model| assistant)?\b",
    r"^\W*I(?:'m| am) sorry,? but I (?:can(?:no|')?t|am (?:not able|unable))\b",
    r"^\W*(?:sorry, )?I can(?:no|')?t (?:assist|help) with that\b",
    r"作为(?:一个|一名|一款)?(?:人工智能|AI)(?:语言)?(?:模型|助手|助理)",
    r"我(?:只)?是(?:一个|一名|一款)(?:人工智能|AI)(?:语言)?(?:模型|助手|助理)",
    r"^\W*(?:很抱歉|非常抱歉|抱歉|对不起)[,，。!！]?\s*我(?:无法|不能|没有办法)",
)


class WeightedSourceBlock(SourceBlock):
    """One source, and how much of it `mix.type=source` takes."""

    weight: PositiveFloat = 1.0
    """Share of the mix beside the other sources' weights; read by `mix.type=source` alone."""

    @property
    def name(self) -> str:
        """What reports and the column `source` call it."""
        split = None if self.split == "train" else self.split
        part = ", ".join(name for name in (self.subset, self.data_dir, split) if name)
        return f"{self.source} ({part})" if part else self.source


class WeightsBlock(Block):
    """What each attribute counts in the score of an answer; those a row lacks leave their weight to the others."""

    correctness: NonNegativeFloat = 0.4
    helpfulness: NonNegativeFloat = 0.3
    coherence: NonNegativeFloat = 0.2
    complexity: NonNegativeFloat = 0.05
    verbosity: NonNegativeFloat = 0.05

    @model_validator(mode="after")
    def something_counts(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0; give at least one attribute a weight above 0")
        return self


class NamesBlock(Block):
    """Which attribute a source's own name stands for; null leaves it out. Several names of one are averaged."""

    honesty: Attribute | None = "correctness"
    truthfulness: Attribute | None = "correctness"
    instruction_following: Attribute | None = "coherence"


class RatingsBlock(Block):
    """From several rated answers to pairs. Ratings are put on 0..1 by their scale first."""

    weights: WeightsBlock = WeightsBlock()
    names: NamesBlock = NamesBlock()
    pairs: Literal["best_worst", "all_pairs"] = "best_worst"
    """Pairs of a row with more than two answers, rankings included."""
    min_gap: Fraction = 0.1
    """Smallest difference of the weighted scores in a pair; pairs without ratings by attribute need none."""


class NearDuplicatesBlock(Block):
    """Pairs whose prompt and chosen answer share most of their words in a row with an earlier pair of another row."""

    jaccard: float = Field(0.8, ge=0.5, le=1.0)
    """Shared shingles over all shingles of both, from which on they are duplicates; estimated with MinHash."""
    shingle: PositiveInt = 3
    """Words of a shingle; a Chinese or Japanese character is a word."""


class FiltersBlock(Block):
    """What is dropped. A pair counts under the first reason that holds, in the order of these options."""

    min_chars: NonNegativeInt = 10
    """Shortest answer, in characters without outer blanks; both answers of a pair must have them."""
    max_chars: PositiveInt | None = None
    """Longest prompt with one answer, in characters; null has no limit."""
    templates: tuple[str, ...] = TEMPLATES
    """Regular expressions that must match neither answer; case does not matter."""
    exact_duplicates: bool = True
    """Drop pairs that are the same as an earlier one in every message."""
    near_duplicates: NearDuplicatesBlock | None = NearDuplicatesBlock()
    """Drop near duplicates; null keeps them."""

    @field_validator("templates")
    @classmethod
    def templates_are_expressions(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            try:
                re.compile(template)
            except re.error as error:
                raise ValueError(f"{template!r} is no regular expression ({error}); correct it") from error
            if re.search(template, ""):
                raise ValueError(f"{template!r} is found in every text; make it say more")
        return templates


class MixBlock(Block):
    """How many pairs come out."""

    size: PositiveInt | None = None
    """Pairs to draw, by seed; null takes as many as the shares allow. Shares stay exact where there are too few."""


class LanguageMixBlock(MixBlock):
    """Fixed shares of languages; pairs in others are dropped."""

    type: Literal["language"] = "language"
    shares: Mapping[Language, Share] = {"en": 0.7, "zh": 0.3}
    """Share of each ISO 639 code; they add up to 1."""

    @field_validator("shares")
    @classmethod
    def shares_add_up(cls, shares: Mapping[str, float]) -> Mapping[str, float]:
        total = sum(shares.values())
        if abs(total - 1) > SHARES_ERROR:
            raise ValueError(f"{dict(shares)} add up to {total:g}; give every language a share, 1 in all")
        return shares


class SourceMixBlock(MixBlock):
    """Shares of the sources by their weights."""

    type: Literal["source"] = "source"


class PlainMixBlock(MixBlock):
    """Every pair, or a draw of `size` from all of them."""

    type: Literal["none"] = "none"


MixUnion = Annotated[LanguageMixBlock | SourceMixBlock | PlainMixBlock, Field(discriminator="type")]


class PrepareConfig(Block):
    """One preparation."""

    sources: tuple[WeightedSourceBlock, ...] = Field(min_length=1)
    """Read in this order; of duplicates the first stays."""
    output: Path
    """Folder to make; it must not exist."""
    seed: Seed = 0
    """Seeds the draw of the mix."""
    max_invalid: Fraction = 0.01
    """Share of a source's rows that may be bad and are then left out, listed in quarantine.jsonl."""
    ratings: RatingsBlock = RatingsBlock()
    filters: FiltersBlock = FiltersBlock()
    mix: MixUnion = LanguageMixBlock()

    @model_validator(mode="after")
    def sources_differ(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources name {name!r} {names.count(name)} times; name it once")
        return self
