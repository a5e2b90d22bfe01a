"""raylign's trainer alone, over shapes: a fresh actor on a random Llama for every series."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig

from actors.cluster import cluster
from actors.trainer.group import TrainerGroup
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import PlackettLuceLossBlock
from raylign.records import Preference
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.flops import SCORED, TRAINED, sequence_flops
from tests.benchmarks.harness.meter import memory_of
from tests.benchmarks.harness.models import save_random_llama
from tests.benchmarks.harness.scaling import Point, ScalingJob, ScalingResult, Series, Shape
from tests.benchmarks.harness.trainers import Place, preference, trainer_group

_SMALLEST = Shape(preferences=1, candidates=2, prompt=2, completion=2)


def run(job: ScalingJob) -> ScalingResult:
    with cluster(), tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        points = [point for series in job.series for point in _points(series, job, Path(folder, series.name))]
    return ScalingResult(points=tuple(points))


def _points(series: Series, job: ScalingJob, folder: Path) -> Iterator[Point]:
    path = save_random_llama(folder, width=series.width, layers=series.layers, vocabulary=series.vocabulary)
    config = AutoConfig.from_pretrained(path)
    block = TrainerBlock(
        lr_scheduler_type="constant",
        packing=series.packing,
        per_device_train_batch_size=max(shape.preferences for shape in series.shapes.values()),
        max_tokens_per_micro_batch=series.max_tokens,
    )
    loss = PlackettLuceLossBlock(beta=0.1)
    with trainer_group(ModelBlock(path=path), block, loss, Place(job.threads), pad_id=2) as (group, pid):
        _step(group, _preferences(_SMALLEST, series.vocabulary))
        own = memory_of(pid)["VmHWM"]
        for at, shape in series.shapes.items():
            preferences = _preferences(shape, series.vocabulary)
            _step(group, preferences)
            seconds = min(_step(group, preferences) for _ in range(job.repeats))
            sequence = sequence_flops(config, shape.prompt, shape.completion, TRAINED + SCORED)
            yield Point(
                series=series.name,
                axis=series.axis,
                at=at,
                counted=shape.counted,
                seconds=seconds,
                gflops=shape.preferences * shape.candidates * sequence / seconds / 1e9,
                own_bytes=own,
                activation_bytes=memory_of(pid)["VmHWM"] - own,
            )
            progress(f"{series.name}, {series.axis} {at}: {shape.counted / seconds:.0f} tokens/s")


def _step(group: TrainerGroup, preferences: list[Preference]) -> float:
    """Seconds of the reference pass and an optimizer step."""
    started = time.perf_counter()
    list(group.train(group.with_reference(preferences, 0, 0), 0))
    return time.perf_counter() - started


def _preferences(shape: Shape, vocabulary: int) -> list[Preference]:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    return [
        preference(index, ids(shape.prompt), [ids(shape.completion) for _ in range(shape.candidates)])
        for index in range(shape.preferences)
    ]


if __name__ == "__main__":
    contestant(run, ScalingJob)
