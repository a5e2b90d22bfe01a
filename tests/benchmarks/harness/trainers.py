"""raylign's trainer for benchmarks: one DeepSpeed rank as a Ray actor behind a TrainerGroup, and preferences for it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from actors.trainer.actor import TrainerActor, TrainerSpec, free_address
from actors.trainer.group import TrainerGroup
from actors.trainer.rank import DeepSpeedRank
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import LossBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.records import Candidate, Preference, Prompt
from tests.benchmarks.harness.products import widen_products

_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank computes; with `wide_products`, hosts without bf16 instructions multiply bf16 matrices in fp32."""

    threads: int
    on_gpu: bool = False
    wide_products: bool = False


class _WideRank(DeepSpeedRank):
    def __init__(self, *arguments: Any) -> None:
        widen_products()
        super().__init__(*arguments)


@contextmanager
def trainer_group(
    model: ModelBlock, trainer: TrainerBlock, loss: LossBlock, place: Place, *, pad_id: int
) -> Iterator[tuple[TrainerGroup, int]]:
    """A loaded group of one rank with the initial policy as reference, and its process id."""
    spec = TrainerSpec(
        folder=model.path,
        reference_folder=model.path,
        pad_id=pad_id,
        model=model,
        trainer=trainer,
        loss=loss,
        reference=InitialReferenceBlock(),
        rounds=1,
        seed=0,
        threads=place.threads,
        on_gpu=place.on_gpu,
        stacks=tempfile.gettempdir(),
    )
    kind: Any = ray.remote(_WideRank) if place.wide_products else TrainerActor
    actor = kind.options(num_cpus=1, num_gpus=1 if place.on_gpu else 0).remote(spec, 0, *free_address())
    try:
        pid: int = ray.get(actor.ready.remote(), timeout=_TIMEOUT_S)
        yield TrainerGroup([actor], loss=loss, reference=spec.reference, step_timeout_s=_TIMEOUT_S), pid
    finally:
        ray.kill(actor)


def preference(index: int, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Preference:
    """Completions of `prompt`, best first; texts and the sampler's log-probs are not read for a loss on given ids."""
    candidates = tuple(
        Candidate(f"p{index}", number, tuple(ids), (0.0,) * len(ids), "", "stop", 0, 0)
        for number, ids in enumerate(completions)
    )
    scores = tuple(float(-number) for number in range(len(completions)))
    return Preference(Prompt(f"p{index}", (), tuple(prompt)), candidates, scores, (1.0,) * len(completions))
