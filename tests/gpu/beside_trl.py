"""TRL's DPOTrainer on the loads of `speed`, in its best settings."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch

from tests.benchmarks.harness.dpo import DpoJob
from tests.gpu.speed import (
    LORA,
    RATE,
    Load,
    Mode,
    compare,
    keep_rate,
    loads,
    rate_of,
    report,
    reset_peak,
    vocabulary_of,
)
from tests.gpu.stage import PAD, Stage, large_folder

_NEEDED = ("trl", "datasets", "accelerate", "pyarrow", "pandas")
_LOAD_S = 35.0
"""About what loading two models and training takes."""
TrlDtype = Literal["float32", "bfloat16"]
_MEANT: dict[TrlDtype, str] = {
    "float32": "fp32 weights, bf16 autocast",
    "bfloat16": "bf16 weights without masters",
}


def check(stage: Stage, mode: Mode) -> None:
    """Each load, in the dtypes that may be the best."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        stage.sheet.skip(f"TRL {mode}", f"not installed: {', '.join(missing)}")
        return
    for load in loads(stage, mode):
        for dtype in _dtypes(stage, mode, load):
            what = f"TRL {mode}, {load.name}, {_MEANT[dtype]}"
            if stage.sheet.has_time(what, 0 if stage.tiny else _LOAD_S):
                with stage.sheet.trying(what):
                    _run(stage, mode, load, dtype)
        compare(stage, mode, load)


def _dtypes(stage: Stage, mode: Mode, load: Load) -> Sequence[TrlDtype]:
    """On the first load both; on the others what was faster there, since every run loads its models anew."""
    if stage.tiny:
        return ("bfloat16",)
    first = loads(stage, "full")[0]
    found = {dtype: rate for dtype in _MEANT if (rate := rate_of(stage, f"TRL {dtype}", "full", first)) is not None}
    if (load is first and mode == "full") or not found:
        return ("bfloat16", "float32")
    return (max(found, key=lambda dtype: found[dtype]),)


def _run(stage: Stage, mode: Mode, load: Load, dtype: TrlDtype) -> None:
    from tests.benchmarks.contestants.dpo_trl import run  # noqa: PLC0415 - TRL may not be there

    pairs = load.pairs(vocabulary_of(stage))
    folder, liger = large_folder(stage), stage.on_gpu and find_spec("liger_kernel") is not None
    attention = "flash_attention_2" if stage.on_gpu and find_spec("flash_attn") else "sdpa"
    job = DpoJob(
        folder=folder,
        tokenizer=folder,
        pad_id=PAD,
        warm_up=tuple(pairs[: load.batch]),
        steady=tuple(pairs[load.batch :]),
        batch=load.batch,
        micro_batch=load.micro_batch,
        learning_rate=RATE,
        beta=0.1,
        threads=torch.get_num_threads(),
        on_gpu=stage.on_gpu,
        trl_dtype=dtype,
        trl_attention=attention,
        trl_liger=liger,
        lora=LORA if mode == "LoRA" else None,
    )
    before, started = reset_peak(stage), time.perf_counter()
    result = run(job)
    note = f"{_MEANT[dtype]}, {attention}, {'Liger' if liger else 'no Liger'}; {time.perf_counter() - started:.0f} s"
    report(stage, "TRL", mode, load, result.steady_s, before, note)
    keep_rate(stage, f"TRL {dtype}", mode, load, load.real_tokens / result.steady_s)
