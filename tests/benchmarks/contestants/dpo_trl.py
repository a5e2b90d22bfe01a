"""TRL's DPOTrainer on given pairs."""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from actors.trainer.host_memory import keep_freed_memory
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.dpo import DpoJob, DpoResult
from tests.benchmarks.harness.products import widen_products


class _Clock(TrainerCallback):
    """Times the steps and keeps TRL's own log of each."""

    def __init__(self, warm_up: int) -> None:
        self.logs: list[dict[str, float]] = []
        self.started = self.warm = self.ended = 0.0
        self._warm_up = warm_up

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()
        if state.global_step == self._warm_up:
            self.warm = self.ended

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "rewards/margins" in logs:
            self.logs.append(dict(logs))
            seconds = time.perf_counter() - self.started
            progress(f"step {len(self.logs)}: loss {logs['loss']:.4f} after {seconds:.1f} s")


class _OnTokenIds(DPOTrainer):
    """TRL's trainer on ids that are made already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def run(job: DpoJob) -> DpoResult:
    torch.set_num_threads(job.threads)
    if job.wide_products:
        keep_freed_memory()
        widen_products()
    pairs = [*job.warm_up, *job.steady]
    clock = _Clock(len(job.warm_up) // job.batch)
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        arguments = _arguments(job, folder, len(pairs) // job.batch)
        trainer = _OnTokenIds(
            model=job.folder,
            args=arguments,
            train_dataset=Dataset.from_list([_row(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]),
            processing_class=AutoTokenizer.from_pretrained(job.tokenizer),
            callbacks=[clock],
            peft_config=_lora(job),
            quantization_config=_quantization(job),
        )
        trainer.remove_callback(PrinterCallback)
        progress("trainer ready")
        trainer.train()
        if job.saved is not None:
            trainer.save_model(job.saved)
    return DpoResult(
        losses=tuple(log["loss"] for log in clock.logs),
        margins=tuple(log["rewards/margins"] for log in clock.logs),
        first_s=clock.warm - clock.started,
        steady_s=clock.ended - clock.warm,
        reference_s=0.0 if job.precomputed else None,
        num_tokens=int(clock.logs[-1]["num_tokens"]),
        settings=_settings(arguments, job),
    )


def _row(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> dict[str, list[int]]:
    return {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}


def _arguments(job: DpoJob, folder: str, steps: int) -> DPOConfig:
    return DPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        beta=job.beta,
        max_length=None,
        bf16=job.dtype == "bfloat16",
        use_cpu=not job.on_gpu,
        gradient_checkpointing=False,
        precompute_ref_log_probs=job.precomputed,
        use_liger_kernel=job.trl_liger,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": job.trl_dtype, "attn_implementation": job.trl_attention},
    )


def _lora(job: DpoJob) -> LoraConfig | None:
    if job.lora is None:
        return None
    return LoraConfig(r=job.lora.r, lora_alpha=job.lora.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _quantization(job: DpoJob) -> BitsAndBytesConfig | None:
    if not job.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _settings(arguments: DPOConfig, job: DpoJob) -> dict[str, str | int | float | bool | None]:
    names = (
        "bf16",
        "use_cpu",
        "optim",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "precompute_ref_log_probs",
        "use_liger_kernel",
        "max_grad_norm",
    )
    found = {name: getattr(arguments, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in found.items()} | {
        "dtype": f"{job.trl_dtype} weights",
        "attn_implementation": job.trl_attention,
    }


if __name__ == "__main__":
    contestant(run, DpoJob)
