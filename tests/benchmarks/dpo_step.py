"""A DPO step: TRL's DPOTrainer and raylign's trainer in turn, on the same pairs, reference pass included."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from transformers import AutoConfig

from raylign.config.blocks import LoraBlock
from raylign.models import load_tokenizer, resolve_model
from raylign.report.tables import report_console
from tests.benchmarks.harness.children import Outcome, Stage, measured
from tests.benchmarks.harness.dpo import (
    DpoJob,
    DpoResult,
    RateJob,
    RateResult,
    in_planned_order,
    loss_tolerances,
    planned_steps,
)
from tests.benchmarks.harness.flops import SCORED, TRAINED, step_flops
from tests.benchmarks.harness.meter import gpu_is_present
from tests.benchmarks.harness.models import save_random_llama, save_random_qwen3
from tests.benchmarks.harness.pairs import read_pairs
from tests.benchmarks.harness.report import Check, cores, finish, machine, plain, results_folder, table
from tests.benchmarks.harness.sampled import sampled_pairs

MIN_SPEED_UP = {"cpu": 5.0, "gpu": 1.8}
MAX_MEMORY_SHARE = 0.6
MAX_FP32_DIFFERENCE = 1e-3
"""In fp32 two correct trainers differ by the order of their additions only."""
MAX_QLORA_GIB = 16.0
GPU_MAX_LENGTH = 1024
SAMPLED_TOKENS = 192
"""Of a completion, where no file of pairs is given."""
GIB = 2**30

Outcomes = dict[str, Outcome[DpoResult]]
TrlDtype = Literal["float32", "bfloat16"]


def main(
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Pairs in LLaMA-Factory's format; else sampled.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps; the first is reported apart.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence, at most; 1024 with --gpu.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Constant, for both.")] = 5e-6,
    threads: Annotated[int, typer.Option(help="Compute threads of every contestant; 0: one a core.")] = 0,
    trl_micro_batch: Annotated[int, typer.Option(help="Pairs that TRL runs at a time; 0: the whole step.")] = 0,
    trl_dtype: Annotated[
        TrlDtype, typer.Option(help="TRL's weights: float32 under bf16 autocast, or bfloat16.")
    ] = "float32",
    precomputed: Annotated[bool, typer.Option(help="Also run TRL with precompute_ref_log_probs.")] = True,
    gpu: Annotated[bool, typer.Option("--gpu", help="A model of Qwen3-1.7B's shape on the GPU, and QLoRA.")] = False,
) -> None:
    """Compare TRL's DPOTrainer and raylign on the same pairs: tokens a second, peak memory, losses."""
    console = report_console()
    if gpu and not gpu_is_present():
        console.print("dpo_step --gpu: not measured: no GPU")
        return
    folder = results_folder("dpo_step_gpu" if gpu else "dpo_step")
    stage = Stage(console, folder, threads or cores(), on_gpu=gpu)
    facts = machine(stage)
    with tempfile.TemporaryDirectory(prefix="bench-models-") as scratch:
        embedded = resolve_model("embedded:smollm2-135m")
        tokenizer = load_tokenizer(embedded)
        model = save_random_qwen3(Path(scratch, "qwen3")) if gpu else embedded
        source = data or sampled_pairs(steps * batch, SAMPLED_TOKENS, stage.say)
        pairs = read_pairs(source, tokenizer, steps * batch, GPU_MAX_LENGTH if gpu else max_length)
        longest = sorted(range(len(pairs)), key=lambda index: -pairs[index].real_tokens)[:batch]
        job = DpoJob(
            folder=model,
            tokenizer=embedded,
            pad_id=int(tokenizer.pad_token_id),
            # The largest step comes first: no contestant has to take fresh memory in a step that is timed.
            warm_up=tuple(pairs[index] for index in longest),
            steady=tuple(pair for index, pair in enumerate(pairs) if index not in longest),
            batch=batch,
            micro_batch=batch,
            learning_rate=learning_rate,
            beta=0.1,
            threads=stage.threads,
            on_gpu=gpu,
            trl_attention=_best_attention(gpu),
            trl_liger=gpu and find_spec("liger_kernel") is not None,
        )
        trl = {"micro_batch": trl_micro_batch or batch, "trl_dtype": trl_dtype}
        with measured("dpo_step"):
            outcomes = _contest(stage, job, trl, precomputed)
            exact = _contest_in_fp32(stage, job, Path(scratch, "tiny"))
            rate = stage.run("matmul", "matmul", _rate_job(job), RateResult).result.flops
            extra = [_qlora_check(stage, job)] if gpu else []
    tables = [_speed_table(job, outcomes, rate), _loss_table(job, outcomes)]
    checks = [*_checks(job, outcomes), _fp32_check(exact), *extra]
    record = {"machine": facts, "job": _described(job), "matmul_flops": rate, "contestants": plain(outcomes)}
    finish(console, folder, tables, checks, record)


def _best_attention(gpu: bool) -> str:
    return "flash_attention_2" if gpu and find_spec("flash_attn") else "sdpa"


def _contest(stage: Stage, job: DpoJob, trl: dict[str, Any], precomputed: bool) -> Outcomes:
    """Every contestant in turn, TRL's pairs in the order in which raylign's plan takes them."""
    peer = in_planned_order(job).model_copy(update=trl)
    outcomes = {"TRL": stage.run("TRL", "dpo_trl", peer, DpoResult)}
    if precomputed:
        ahead = peer.model_copy(update={"precomputed": True})
        outcomes["TRL precomputed"] = stage.run("TRL precomputed", "dpo_trl", ahead, DpoResult)
    return outcomes | {"raylign": stage.run("raylign", "dpo_raylign", job, DpoResult)}


def _contest_in_fp32(stage: Stage, job: DpoJob, folder: Path) -> Outcomes:
    """Both on a tiny random Llama in fp32 at a rate that moves the loss."""
    vocabulary = AutoConfig.from_pretrained(job.tokenizer).vocab_size
    tiny = save_random_llama(folder, width=64, layers=2, vocabulary=vocabulary)
    changes: dict[str, Any] = {"folder": tiny, "dtype": "float32", "learning_rate": 1e-4, "trl_attention": "sdpa"}
    exact = job.model_copy(update=changes | {"steady": job.steady[: 2 * job.batch]})
    return {
        "TRL": stage.run("TRL fp32", "dpo_trl", in_planned_order(exact), DpoResult),
        "raylign": stage.run("raylign fp32", "dpo_raylign", exact, DpoResult),
    }


def _qlora_check(stage: Stage, job: DpoJob) -> Check:
    """One pair at a time, as on a card of that size."""
    changes = {"load_in_4bit": True, "lora": LoraBlock(r=32, lora_alpha=64), "micro_batch": 1}
    memory = stage.run("raylign QLoRA", "dpo_raylign", job.model_copy(update=changes), DpoResult).memory
    assert memory.gpu is not None
    return Check("GPU memory of a QLoRA step, r=32", memory.gpu / GIB, "at most", MAX_QLORA_GIB, " GiB")


def _rate_job(job: DpoJob) -> RateJob:
    tokens = sum(pair.real_tokens for pair in job.steady) * job.batch // len(job.steady)
    return RateJob(folder=job.folder, tokens=tokens, threads=job.threads, on_gpu=job.on_gpu)


def _tokens_a_second(job: DpoJob, seconds: float) -> float:
    return sum(pair.real_tokens for pair in job.steady) / seconds


def _train_s(result: DpoResult) -> float:
    """Seconds of the steady steps without the reference pass."""
    return result.steady_s - (result.reference_s or 0.0)


def _memory(job: DpoJob, outcome: Outcome[DpoResult]) -> int:
    """Bytes on the GPU, or of all the contestant's processes."""
    return outcome.memory.gpu if outcome.memory.gpu is not None else outcome.memory.tree


def _speed_table(job: DpoJob, outcomes: Outcomes, rate: float) -> Table:
    """One row per contestant; raylign with its reference log-probs recorded is the same run without their pass."""
    config = AutoConfig.from_pretrained(job.folder)
    train, score = (step_flops(config, job.steady, per_weight) for per_weight in (TRAINED, SCORED))
    rows: list[list[object]] = []
    for name, outcome in outcomes.items():
        result, recorded = outcome.result, name == "TRL precomputed"
        cells = [result.first_s, _tokens_a_second(job, result.steady_s)]
        share = (train + (0 if recorded else score)) / result.steady_s / rate
        rows.append([name, *cells, 100 * share, _memory(job, outcome) / GIB, outcome.memory.process / GIB])
    seconds = _train_s(outcomes["raylign"].result)
    share = train / seconds / rate
    rows.append(["raylign recorded", "-", _tokens_a_second(job, seconds), 100 * share, "-", "-"])
    headers = [
        "contestant",
        "first step\ns",
        "tokens/s",
        "% of matmul\nrate",
        "peak memory\nGiB",
        "largest process\nGiB",
    ]
    tokens, steps = sum(pair.real_tokens for pair in job.steady), len(job.steady) // job.batch
    return table(
        f"{steps} steps of {job.batch} pairs, {tokens} tokens; matmul rate {rate / 1e9:.0f} GFLOP/s", headers, rows
    )


def _loss_table(job: DpoJob, outcomes: Outcomes) -> Table:
    trl, ours = outcomes["TRL"].result, outcomes["raylign"].result
    columns = (trl.losses, ours.losses, _differences(outcomes), _tolerances(job), trl.margins, ours.margins)
    rows = [[str(step), *values] for step, values in enumerate(zip(*columns, strict=True), 1)]
    headers = ["step", "loss\nTRL", "loss\nraylign", "difference", "tolerance", "margins\nTRL", "margins\nraylign"]
    return table("loss and rewards/margins", headers, rows)


def _differences(outcomes: Outcomes) -> list[float]:
    """Absolute loss differences, step by step."""
    pairs = zip(outcomes["TRL"].result.losses, outcomes["raylign"].result.losses, strict=True)
    return [abs(left - right) for left, right in pairs]


def _tolerances(job: DpoJob) -> list[float]:
    return loss_tolerances([*planned_steps(job, job.warm_up, 0), *planned_steps(job, job.steady, 1)], job.beta)


def _checks(job: DpoJob, outcomes: Outcomes) -> list[Check]:
    trl, ours = outcomes["TRL"], outcomes["raylign"]
    limit = MIN_SPEED_UP["gpu" if job.on_gpu else "cpu"]
    real = sum(pair.real_tokens for pair in [*job.warm_up, *job.steady])
    wrong = sum(abs(outcome.result.num_tokens - real) for outcome in outcomes.values())
    off = max(d / t for d, t in zip(_differences(outcomes), _tolerances(job), strict=True))
    checks = [
        Check("tokens/s, times TRL's, reference included", _speed_up(trl, ours), "at least", limit),
        Check("peak memory, share of TRL's", _memory(job, ours) / _memory(job, trl), "at most", MAX_MEMORY_SHARE),
        Check("tokens counted differently", wrong, "at most", 0),
        Check("bf16 loss difference, share of its tolerance", off, "at most", 1),
    ]
    if ahead := outcomes.get("TRL precomputed"):
        ratio = ahead.result.steady_s / _train_s(ours.result)
        checks.append(Check("tokens/s, times TRL's, both with recorded reference log-probs", ratio, "at least", 1))
    return checks


def _speed_up(trl: Outcome[DpoResult], ours: Outcome[DpoResult]) -> float:
    return trl.result.steady_s / ours.result.steady_s


def _fp32_check(outcomes: Outcomes) -> Check:
    return Check("fp32 loss difference (nats)", max(_differences(outcomes)), "at most", MAX_FP32_DIFFERENCE)


def _described(job: DpoJob) -> dict[str, Any]:
    """The job without its token ids."""
    counts = {name: len(getattr(job, name)) for name in ("warm_up", "steady")}
    return job.model_dump(mode="json") | counts | {"tokens": sum(pair.real_tokens for pair in job.steady)}


if __name__ == "__main__":
    typer.run(main)
