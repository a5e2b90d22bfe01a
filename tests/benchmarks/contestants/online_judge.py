"""Held-out scores of trained adapters: sampled by one and the same sampler with one and the same seed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from raylign.config import OnlineDpoConfig, load_config
from raylign.evaluation.held_out import evaluate
from raylign.models import load_tokenizer, resolve_model
from raylign.prompts import load_prompts
from raylign.records import Candidate, Prompt, Score
from raylign.scoring.vader import compound
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.online import JudgeJob, JudgeResult


def run(job: JudgeJob) -> JudgeResult:
    torch.set_num_threads(job.threads)
    config = load_config(Path(job.recipe), job.settings)
    folder = resolve_model(config.model.path)
    tokenizer = load_tokenizer(folder)
    prompts = load_prompts(config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed).held_out
    found = {}
    for name, adapter in job.adapters.items():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        candidates = _sample(model.eval(), tokenizer, prompts, config, job.samples)
        scores = [Score(value) for value in compound([], [candidate.text for candidate in candidates])]
        found[name] = asdict(evaluate(prompts, candidates, scores, [], config.evaluation, config.run.seed))
        progress(f"{name}: held-out score {found[name]['score']:.3f}")
    return JudgeResult(evaluations=found)


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: OnlineDpoConfig,
    samples: int,
) -> list[Candidate]:
    """`samples` completions of each prompt at the evaluation temperature, prompt by prompt."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.pad({"input_ids": [list(prompt.token_ids) for prompt in prompts]}, return_tensors="pt")
    sampler: Any = model.generate
    torch.manual_seed(config.run.seed)
    with torch.inference_mode():
        output: Tensor = sampler(
            **inputs,
            do_sample=True,
            temperature=config.evaluation.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.sampling.max_new_tokens,
            num_return_sequences=samples,
            pad_token_id=tokenizer.pad_token_id,
        )
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        _candidate(prompts[number // samples].id, number % samples, ids, tokenizer)
        for number, ids in enumerate(completions)
    ]


def _candidate(prompt_id: str, index: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Candidate:
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Candidate(prompt_id, index, tuple(kept), (), str(text), "stop" if ended else "length", 0, 0)


if __name__ == "__main__":
    contestant(run, JudgeJob)
