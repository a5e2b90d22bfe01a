"""raylign's trainer on given pairs: one DeepSpeed rank as a Ray actor, driven as a recipe drives it."""

import time
from collections.abc import Sequence

import ray

from actors.cluster import cluster
from actors.network import free_address
from actors.trainer import TrainerRank, TrainerSpec
from actors.trainer_group import TrainerGroup
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.records import Candidate, Preference, Prompt
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.dpo import DpoJob, DpoResult
from tests.benchmarks.harness.pairs import TokenPair

_TIMEOUT_S = 1200.0


def run(job: DpoJob) -> DpoResult:
    with cluster():
        group = start_group(job)
        progress("trainer ready")
        steps: list[dict[str, float]] = []
        first_s, _ = _round(group, job, job.warm_up, 0, steps)
        steady_s, reference_s = _round(group, job, job.steady, 1, steps)
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
    group: TrainerGroup, job: DpoJob, pairs: Sequence[TokenPair], seed: int, steps: list[dict[str, float]]
) -> tuple[float, float]:
    """(seconds, of which for the reference): its log-probs of all pairs, then a step for every batch."""
    preferences = [preference(index, pair) for index, pair in enumerate(pairs)]
    started = time.perf_counter()
    recorded = group.with_reference(preferences, seed, 0)
    reference_s = time.perf_counter() - started
    progress(f"reference log-probs of {len(pairs)} pairs in {reference_s:.1f} s")
    for metrics in group.train(recorded, seed):
        steps.append(metrics)
        progress(f"step {len(steps)}: loss {metrics['loss']:.4f} after {time.perf_counter() - started:.1f} s")
    return time.perf_counter() - started, reference_s


def start_group(job: DpoJob) -> TrainerGroup:
    """A group of one rank, loaded."""
    spec = TrainerSpec(
        folder=job.folder,
        reference_folder=job.folder,
        pad_id=job.pad_id,
        model=ModelBlock(path=job.folder, dtype=job.dtype, lora=job.lora, load_in_4bit=job.load_in_4bit),
        trainer=trainer_block(job),
        loss=SigmoidLossBlock(beta=job.beta),
        reference=InitialReferenceBlock(),
        total_steps=1,
        seed=0,
        threads=job.threads,
        on_gpu=job.on_gpu,
    )
    actor = TrainerRank.options(num_cpus=1, num_gpus=1 if job.on_gpu else 0).remote(spec, 0, *free_address())
    ray.get(actor.ready.remote(), timeout=_TIMEOUT_S)
    return TrainerGroup([actor], loss=spec.loss, reference=spec.reference, step_timeout_s=_TIMEOUT_S)


def trainer_block(job: DpoJob) -> TrainerBlock:
    return TrainerBlock(
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
    )


def preference(index: int, pair: TokenPair) -> Preference:
    """The pair as the trainer reads it; texts and sampler log-probs are not needed for a loss on given ids."""
    prompt = Prompt(f"p{index}", (), pair.prompt)
    candidates = tuple(
        Candidate(prompt.id, number, ids, (0.0,) * len(ids), "", "stop", 0, 0)
        for number, ids in enumerate((pair.chosen, pair.rejected))
    )
    return Preference(prompt, candidates, (1.0, 0.0), (1.0, 1.0))


def _settings(job: DpoJob) -> dict[str, str | int | float | bool | None]:
    block = trainer_block(job)
    names = ("packing", "zero_stage", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm")
    return {name: getattr(block, name) for name in names} | {"dtype": f"{job.dtype}, fp32 masters"}


if __name__ == "__main__":
    contestant(run, DpoJob)
