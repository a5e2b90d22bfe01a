"""One trainer rank without Ray, driven as `TrainerGroup` drives it."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from actors.trainer.actor import TrainerSpec, free_address
from actors.trainer.rank import DeepSpeedRank
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.records import Preference
from tests.gpu.stage import PAD, Stage, free


def spec_of(stage: Stage, folder: str, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> TrainerSpec:
    """DPO at beta 0.1 against the initial policy, at a constant learning rate, on one rank."""
    return TrainerSpec(
        folder=folder,
        reference_folder=folder,
        pad_id=PAD,
        model=ModelBlock.model_validate({"path": folder, **model}),
        trainer=TrainerBlock.model_validate({"lr_scheduler_type": "constant", **trainer}),
        loss=SigmoidLossBlock(beta=0.1),
        reference=InitialReferenceBlock(),
        rounds=10,
        seed=0,
        threads=len(os.sched_getaffinity(0)) if stage.on_gpu else 1,
        on_gpu=stage.on_gpu,
        stacks=tempfile.gettempdir(),
    )


def start_rank(spec: TrainerSpec) -> DeepSpeedRank:
    """The one rank of a group; one that nobody holds any more has left the GPU by then."""
    free()
    return DeepSpeedRank(spec, 0, *free_address())


def with_reference(rank: DeepSpeedRank, pairs: Sequence[Preference], seed: int) -> list[Preference]:
    """The pairs with the reference's log-probs, as `TrainerGroup.with_reference` has them."""
    found = rank.reference_candidates(pairs, seed, 0)
    return [dataclasses.replace(pair, reference_logps=found[n].candidates) for n, pair in enumerate(pairs)]
