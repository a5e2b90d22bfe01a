"""TRL's OnlineDPOTrainer on the recipe's prompts, with the same reward, generating with transformers."""

import time
from collections.abc import Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.data_utils import maybe_apply_chat_template
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from raylign.config import OnlineDpoConfig, load_config
from raylign.models import load_tokenizer, resolve_model
from raylign.prompts import draw, load_prompts
from raylign.records import Prompt
from raylign.scoring.vader import compound
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.online import OnlineJob, OnlineResult, Stop, process_age_s

_MOST_STEPS = 400


class _Clock(TrainerCallback):
    """Times the steps and ends training when the job says so."""

    def __init__(self, stop: Stop) -> None:
        self.durations: list[float] = []
        self.start_s = self._last = 0.0
        self._stop = stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        self.start_s = process_age_s()
        progress(f"trainer ready in {self.start_s:.0f} s")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.durations.append(now - self._last)
        self._last = now
        control.should_training_stop = self._stop.reached(self.durations)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "objective/scores" in kwargs["logs"]:
            score = kwargs["logs"]["objective/scores"]
            progress(f"step {len(self.durations)}: {self.durations[-1]:.1f} s, score of its samples {score:.3f}")


def reward(prompts: Any, completions: Sequence[Sequence[dict[str, str]]], **_: Any) -> list[float | None]:
    """The recipe's own scorer."""
    return [*compound([], [turns[0]["content"] for turns in completions])]


def run(job: OnlineJob) -> OnlineResult:
    torch.set_num_threads(job.threads)
    config = load_config(Path(job.recipe), job.settings)
    folder = resolve_model(config.model.path)
    tokenizer = load_tokenizer(folder)
    assert config.model.lora is not None
    clock = _Clock(job.stop)
    arguments = _arguments(config, job)
    trainer = OnlineDPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=arguments,
        train_dataset=_dataset(config, tokenizer, job.trl_batch),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.model.lora.r,
            lora_alpha=config.model.lora.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(job.adapter)
    return OnlineResult(
        start_s=clock.start_s,
        seconds=tuple(clock.durations),
        prompts=job.trl_batch,
        stages={},
        settings=_settings(arguments),
    )


def _dataset(config: OnlineDpoConfig, tokenizer: PreTrainedTokenizerBase, batch: int) -> Dataset:
    """The prompts that raylign draws, round after round; their token ids must be what TRL makes of the messages."""
    prompts = load_prompts(config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed).train
    for prompt in prompts:
        text = maybe_apply_chat_template(_row(prompt), tokenizer)["prompt"]
        assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == prompt.token_ids
    size, seed = config.schedule.prompts_per_round, config.run.seed
    drawn = chain.from_iterable(draw(prompts, index, size, seed) for index in count(1))
    return Dataset.from_list([_row(prompt) for prompt in islice(drawn, _MOST_STEPS * batch)])


def _row(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": [dict(message) for message in prompt.messages]}


def _arguments(config: OnlineDpoConfig, job: OnlineJob) -> OnlineDPOConfig:
    return OnlineDPOConfig(
        output_dir=job.work,
        max_steps=_MOST_STEPS,
        per_device_train_batch_size=job.trl_batch,
        learning_rate=config.trainer.learning_rate,
        lr_scheduler_type="constant",
        beta=[0.1],
        max_new_tokens=config.sampling.max_new_tokens,
        max_length=config.generators.max_model_len,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16", "device_map": None, "attn_implementation": "sdpa"},
    )


def _settings(arguments: OnlineDPOConfig) -> dict[str, str | int | float | bool | None]:
    names = (
        "per_device_train_batch_size",
        "learning_rate",
        "beta",
        "max_new_tokens",
        "temperature",
        "bf16",
        "use_cpu",
        "optim",
        "gradient_checkpointing",
        "use_vllm",
    )
    found = {name: getattr(arguments, name) for name in names}
    return {name: getattr(value, "value", value) for name, value in found.items()} | {"dtype": "bfloat16 base"}


if __name__ == "__main__":
    contestant(run, OnlineJob)
