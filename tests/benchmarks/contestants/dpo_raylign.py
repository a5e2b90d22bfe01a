"""raylign's trainer on given pairs, driven as a recipe drives it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from actors.cluster import cluster
from actors.trainer.group import TrainerGroup
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.models.resolve import CONFIG
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.dpo import DpoJob, DpoResult
from tests.benchmarks.harness.pairs import TokenPair
from tests.benchmarks.harness.trainers import Place, preference, trainer_group


def run(job: DpoJob) -> DpoResult:
    model = ModelBlock(path=job.folder, dtype=job.dtype, lora=job.lora, load_in_4bit=job.load_in_4bit)
    loss = SigmoidLossBlock(beta=job.beta)
    steps: list[dict[str, float]] = []
    place = Place(threads=job.threads, on_gpu=job.on_gpu, wide_products=job.wide_products)
    starting = trainer_group(model, _block(job), loss, place, pad_id=job.pad_id)
    with cluster(), starting as (group, _):
        progress("trainer ready")
        first_s, _ = _round(group, job.warm_up, 0, steps)
        steady_s, reference_s = _round(group, job.steady, 1, steps)
        if job.saved is not None:
            _save(group, Path(job.folder), Path(job.saved))
    return DpoResult(
        losses=tuple(step["loss"] for step in steps),
        margins=tuple(step["rewards/margins"] for step in steps),
        first_s=first_s,
        steady_s=steady_s,
        reference_s=reference_s,
        num_tokens=int(sum(step["num_tokens"] for step in steps)),
        settings=_settings(job),
    )


def _round(
    group: TrainerGroup, pairs: Sequence[TokenPair], seed: int, steps: list[dict[str, float]]
) -> tuple[float, float]:
    """(seconds, of which for the reference): its log-probs of all pairs, then a step for every batch."""
    preferences = [preference(index, pair.prompt, (pair.chosen, pair.rejected)) for index, pair in enumerate(pairs)]
    started = time.perf_counter()
    recorded = group.with_reference(preferences, seed, 0)
    reference_s = time.perf_counter() - started
    progress(f"reference log-probs of {len(pairs)} pairs in {reference_s:.1f} s")
    for metrics in group.train(recorded, seed):
        steps.append(dict(metrics))
        progress(f"step {len(steps)}: loss {metrics['loss']:.4f} after {time.perf_counter() - started:.1f} s")
    return time.perf_counter() - started, reference_s


def _save(group: TrainerGroup, source: Path, folder: Path) -> None:
    """The trained weights as they are published, beside the configuration of the model they started from."""
    folder.mkdir(parents=True)
    shutil.copy(source / CONFIG, folder)
    group.save_weights(str(folder / "model.safetensors"))


def _block(job: DpoJob) -> TrainerBlock:
    return TrainerBlock(
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
    )


def _settings(job: DpoJob) -> dict[str, str | int | float | bool | None]:
    names = ("packing", "zero_stage", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm")
    return {name: getattr(_block(job), name) for name in names} | {"dtype": f"{job.dtype}, fp32 masters"}


if __name__ == "__main__":
    contestant(run, DpoJob)
