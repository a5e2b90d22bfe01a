"""What a run sampled: whether all of it is there, and which weights it came from by transformers' own forward."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from raylign.run.directory import RunDirectory
from raylign.run.tables import read_candidates

SAME, OTHER = 0.01, 0.1
"""Mean gaps in nats a token: below the first it is the same policy, above the second another one."""


def assert_complete(directory: RunDirectory, index: int, prompts: int, generations: int) -> None:
    """Every candidate of the round is there once, and scored."""
    candidates, scores = read_candidates(directory.round(index) / "candidates.parquet")
    count = Counter((candidate.prompt_id, candidate.index) for candidate in candidates)
    names = {prompt for prompt, _ in count}
    assert len(names) == prompts and set(count) == {(name, place) for name in names for place in range(generations)}
    assert set(count.values()) == {1}
    assert all(score.value is not None for score in scores)


def assert_published(directory: RunDirectory, model: Path) -> None:
    """Round 1 was sampled by the model in that folder, and round 2 by checkpoint 1, which is another policy."""
    assert gap(directory, 1, model, None) < SAME
    assert gap(directory, 2, model, directory.checkpoint(1)) < SAME
    assert gap(directory, 2, model, None) > OTHER


def gap(directory: RunDirectory, index: int, model: Path, checkpoint: Path | None) -> float:
    """Mean difference, in nats a token, between the log-probs that the sampler of a round gave its candidates and
    transformers' on the weights of `checkpoint`, or of `model` itself.
    """
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    policy: nn.Module = base
    if checkpoint is not None and (checkpoint / "adapter_model.safetensors").is_file():
        policy = PeftModel.from_pretrained(base, checkpoint)
    elif checkpoint is not None:
        policy.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    candidates, _ = read_candidates(directory.round(index) / "candidates.parquet")
    sampled = {(each.prompt_id, each.index): each for each in candidates}
    gaps = []
    for row in pq.read_table(directory.round(index) / "preferences.parquet").to_pylist():
        prompt = row["prompt_token_ids"]
        for place in row["indices"]:
            candidate = sampled[row["prompt_id"], place]
            ids = torch.tensor([[*prompt, *candidate.token_ids]])
            with torch.no_grad():
                logps = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps.append((own - torch.tensor(candidate.logprobs)).abs())
    return float(torch.cat(gaps).mean())
