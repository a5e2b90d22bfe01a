"""Speed and memory of a DPO step on Qwen3-1.7B's shape, beside TRL's trainer on the same pairs; QLoRA's memory.

A real token is one of a prompt, counted once a step, or of a completion. Padding and repeated prompts count for nobody,
so that the same pairs have the same number of tokens in both trainers.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from actors.trainer.actor import TrainerSpec
from actors.trainer.rank import DeepSpeedRank
from raylign.config.blocks import LoraBlock
from raylign.records import Completions
from tests.benchmarks.harness.flops import SCORED, TRAINED, matmul_rate, step_flops
from tests.benchmarks.harness.meter import gpu_bytes_in_use
from tests.benchmarks.harness.pairs import TokenPair
from tests.gpu import handover
from tests.gpu.ranks import spec_of, start_rank, with_reference
from tests.gpu.stage import (
    GIB,
    Stage,
    free,
    large_folder,
    preference,
    random_ids,
)

Mode = Literal["full", "LoRA"]
RATE = 5e-6
LORA = LoraBlock(r=16, lora_alpha=32)
_QLORA = {"r": 32, "lora_alpha": 64}
_MAX_QLORA_GIB = 16.0
_MIN_SPEED_UP = 1.8


@dataclass(frozen=True, slots=True)
class Load:
    """Pairs of one shape: `batch` a step, `micro_batch` of them at a time, and `steps` that are timed after a first.

    A step has as many different `prompts` of `prompt` tokens.
    """

    name: str
    prompts: int
    prompt: int
    completion: int
    batch: int
    micro_batch: int
    steps: int

    @property
    def real_tokens(self) -> int:
        """Of the timed steps."""
        return self.steps * (self.prompts * self.prompt + self.batch * 2 * self.completion)

    def pairs(self, vocabulary: int) -> list[TokenPair]:
        """The first `batch` are for the step that is not timed."""
        generator = torch.Generator().manual_seed(11)

        def drawn(length: int) -> tuple[int, ...]:
            return tuple(random_ids(generator, length, vocabulary))

        steps = [[drawn(self.prompt) for _ in range(self.prompts)] for _ in range(self.steps + 1)]
        return [
            TokenPair(prompt=prompts[n % self.prompts], chosen=drawn(self.completion), rejected=drawn(self.completion))
            for prompts in steps
            for n in range(self.batch)
        ]


LONG = Load("8 x 1,024 tokens a step", prompts=4, prompt=256, completion=768, batch=4, micro_batch=4, steps=8)
"""All sequences of one length: nothing is padded."""
SHORT = Load("64 answers of 64 tokens a step", prompts=4, prompt=512, completion=64, batch=32, micro_batch=8, steps=4)
_TINY = Load("tiny", prompts=2, prompt=8, completion=6, batch=2, micro_batch=2, steps=2)


def vocabulary_of(stage: Stage) -> int:
    """Of the model of `large_folder`."""
    return 512 if stage.tiny else 151936


def loads(stage: Stage, mode: Mode) -> list[Load]:
    """Short answers are timed in full alone: with an adapter they show nothing else."""
    if stage.tiny:
        return [_TINY]
    return [LONG, SHORT] if mode == "full" else [LONG]


def ours(stage: Stage, mode: Mode) -> None:
    """raylign's rank on all loads; at the end what leaves the GPU and comes back."""
    folder = large_folder(stage)
    config = AutoConfig.from_pretrained(folder)
    rate = 0.0 if stage.tiny else _matmul_rate(stage, config)
    wanted = loads(stage, mode)
    for number, load in enumerate(wanted):
        what = f"raylign {mode}, {load.name}"
        if not number or stage.sheet.has_time(what, 30):
            with stage.sheet.trying(what):
                _measure(stage, mode, load, config, rate, last=load is wanted[-1])


def _measure(stage: Stage, mode: Mode, load: Load, config: Any, rate: float, *, last: bool) -> None:
    """One load on a rank of its own; in full, the last one also scores and leaves the GPU."""
    before = reset_peak(stage)
    rank, what = start_rank(_spec(stage, mode, load)), f"raylign {mode}, {load.name}"
    stage.sheet.require(f"{what}: rows are shared", rank.layout() == "shared", "at least", 1)
    pairs = load.pairs(vocabulary_of(stage))
    seconds = _timed_steps(rank, load, pairs)
    report(stage, "raylign", mode, load, seconds, before)
    if stage.tiny:
        compare(stage, mode, load)
    if rate:
        flops = sum(step_flops(config, pairs[load.batch :], each) for each in (TRAINED, SCORED))
        stage.sheet.inform(f"{what}: of the matmul rate", 100 * flops / seconds / rate, "%")
    if mode == "full" and last:
        _score_many(stage, rank)
        if stage.sheet.has_time("what leaves the GPU and comes back", 0 if stage.tiny else 40):
            handover.check_large(stage, rank)


def _spec(stage: Stage, mode: Mode, load: Load) -> TrainerSpec:
    """The defaults but for the model, the rate and the size of a step."""
    model: dict[str, Any] = {"dtype": "bfloat16", **({"lora": LORA.model_dump()} if mode == "LoRA" else {})}
    trainer = {
        "learning_rate": RATE,
        "per_device_train_batch_size": load.micro_batch,
        "gradient_accumulation_steps": load.batch // load.micro_batch,
    }
    return spec_of(stage, large_folder(stage), model, trainer)


def _matmul_rate(stage: Stage, config: Any) -> float:
    rate = matmul_rate(config, 8192, stage.device)
    stage.sheet.inform("bf16 matrix products of this model's shapes", rate / 1e12, "TFLOP/s")
    free()
    return rate


def _timed_steps(rank: DeepSpeedRank, load: Load, pairs: Sequence[TokenPair]) -> float:
    """Seconds of all steps but the first, their reference pass included."""
    given = [preference(n, pair.prompt, (pair.chosen, pair.rejected)) for n, pair in enumerate(pairs)]
    taken = 0.0
    for seed, part in enumerate((given[: load.batch], given[load.batch :])):
        started = time.perf_counter()
        for _ in range(rank.begin_round(with_reference(rank, part, seed), seed, 0, ())):
            rank.train_step()
        taken = time.perf_counter() - started
    return taken


def _score_many(stage: Stage, rank: DeepSpeedRank) -> None:
    """Few prompts with many answers in one pass without gradients, as evaluation and reference passes have them."""
    prompts, answers, length = (2, 3, 5) if stage.tiny else (4, 64, 64)
    generator = torch.Generator().manual_seed(13)
    vocabulary = vocabulary_of(stage)
    rows = [
        Completions(
            random_ids(generator, 8 * length, vocabulary),
            [random_ids(generator, length, vocabulary) for _ in range(answers)],
        )
        for _ in range(prompts)
    ]
    rank.reference_logprobs(rows)
    started = time.perf_counter()
    rank.reference_logprobs(rows)
    rate = prompts * (8 + answers) * length / (time.perf_counter() - started)
    what = f"reference pass, {prompts} prompts with {answers} answers of {length} tokens each"
    stage.sheet.inform(what, rate, "tokens/s")


def report(stage: Stage, who: str, mode: Mode, load: Load, seconds: float, before: int, note: str = "") -> None:
    """Rows of a trainer's speed and memory; the rate stays for the other trainer's group, which compares.

    `before` are the bytes that others held of the GPU.
    """
    rate = load.real_tokens / seconds
    stage.sheet.inform(f"{who} {mode}, {load.name}", rate, "tokens/s", note)
    if stage.on_gpu:
        peak = (torch.cuda.max_memory_allocated() - before) / GIB
        stage.sheet.inform(f"{who} {mode}, {load.name}: peak memory", peak, "GiB", note)
    keep_rate(stage, who, mode, load, max(rate, rate_of(stage, who, mode, load) or 0.0))


def keep_rate(stage: Stage, who: str, mode: Mode, load: Load, rate: float) -> None:
    """For the groups that come later, in other processes."""
    _file_of(stage, who, mode, load).write_text(json.dumps(rate))


def rate_of(stage: Stage, who: str, mode: Mode, load: Load) -> float | None:
    """Tokens a second that were kept; None where none were."""
    path = _file_of(stage, who, mode, load)
    return float(json.loads(path.read_text())) if path.exists() else None


def compare(stage: Stage, mode: Mode, load: Load) -> None:
    """raylign's rate over TRL's best, of the same pairs; asked by the group that comes second."""
    what = f"{mode}, {load.name}: real tokens/s, times TRL's best"
    ours, theirs = (rate_of(stage, who, mode, load) for who in ("raylign", "TRL"))
    if ours is None or theirs is None:
        if not stage.tiny:
            stage.sheet.skip(what, f"{'raylign' if ours is None else 'TRL'} was not measured")
    elif stage.on_gpu:
        stage.sheet.require(what, ours / theirs, "at least", _MIN_SPEED_UP)
    else:
        stage.sheet.inform(what, ours / theirs, note="says nothing on a CPU")


def _file_of(stage: Stage, who: str, mode: Mode, load: Load) -> Path:
    return stage.folder / f"{who} {mode} {load.name}.json"


def qlora(stage: Stage) -> None:
    """One pair of two sequences of 1,024 tokens at a time, on a 4-bit base."""
    if not stage.on_gpu:
        stage.sheet.skip("memory of a QLoRA step", "needs CUDA")
        return
    in_use = gpu_bytes_in_use()
    model = {"dtype": "bfloat16", "lora": _QLORA, "load_in_4bit": True}
    trainer = {"learning_rate": RATE, "per_device_train_batch_size": 1}
    load = Load("QLoRA", prompts=1, prompt=256, completion=768, batch=1, micro_batch=1, steps=2)
    rank = start_rank(spec_of(stage, large_folder(stage), model, trainer))
    seconds = _timed_steps(rank, load, load.pairs(vocabulary_of(stage)))
    outside = gpu_bytes_in_use() - in_use - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_reserved() + max(0, outside)
    note = "all that PyTorch took of the GPU, and CUDA's own"
    stage.sheet.require("memory of a QLoRA step, r=32", peak / GIB, "at most", _MAX_QLORA_GIB, "GiB", note)
    stage.sheet.inform("QLoRA, 2 x 1,024 tokens a step", load.real_tokens / seconds, "tokens/s")


def reset_peak(stage: Stage) -> int:
    """Forget the peak so far; returns the bytes that are still held."""
    free()
    if not stage.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
