"""Iterative online DPO in one process, to read: sample, score, pair, measure, train, and again.

Task, loss, packing and pair building are those of `recipes/sentiment_smollm2.yaml`, with transformers in vLLM's place
and one AdamW in the trainers'; no Ray, no recovery, no MLflow. Run it with `python recipes/minimal.py`, change it, and
read `recipes/online_dpo.py` next: the same round over roles that may be many.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
import typer
from torch import Tensor

from raylign.config.blocks import LoraBlock, ModelBlock, PromptsBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.config.pairing import BestWorstPairingBlock
from raylign.losses import LossState, preference_loss
from raylign.models import load_tokenizer, resolve_model
from raylign.models.load import load_policy
from raylign.pairing import build_preferences
from raylign.prompts import draw, load_prompts
from raylign.records import Candidate, Preference, Prompt, Score
from raylign.scoring.vader import compound
from raylign.training.backbone import inner_model, last_hidden_states
from raylign.training.kernels.head import linear_scores
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import PreferenceBatch, loss_input, preference_batch


def sample(model: Any, tokenizer: Any, prompt: Prompt, count: int, new_tokens: int) -> list[Candidate]:
    """`count` completions of the policy as it is; an end that was not sampled is not added."""
    inner_model(model).set_attn_implementation("sdpa")
    ids, end = torch.tensor([prompt.token_ids]), tokenizer.eos_token_id
    with torch.no_grad():
        rows = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=count,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )[:, ids.shape[1] :].tolist()
    found = []
    for index, row in enumerate(rows):
        stopped = end in row
        tokens = tuple(row[: row.index(end) + 1] if stopped else row)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        logprobs = (0.0,) * len(tokens)  # of the sampler; the sigmoid loss does not read them
        found.append(Candidate(prompt.id, index, tokens, logprobs, text, "stop" if stopped else "length", 0, index))
    return found


def score(prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
    """Higher is better: how positive each review sounds."""
    chats = [[dict(message) for message in prompt.messages]] * len(candidates)
    return [Score(value) for value in compound(chats, [candidate.text for candidate in candidates])]


def scores_of(model: Any, batch: PreferenceBatch) -> CompletionScores:
    """Log-probs of all candidates in one packed row: no padding, each prompt once, no [tokens, vocabulary] logits."""
    inner, tokens = inner_model(model), batch.tokens
    hidden = last_hidden_states(inner, tokens, "sdpa")[tokens.predictors]
    head: Any = inner.get_output_embeddings()
    found = linear_scores(hidden, head.weight, head.bias, tokens.labels)
    logps = torch.zeros(tokens.completions).index_add(0, tokens.owners, found.logps)
    return CompletionScores(logps, found, tokens.owners)


def train_step(model: Any, optimizer: torch.optim.Optimizer, pairs: Sequence[Preference], beta: float) -> float:
    """One step of DPO (Rafailov et al. 2023, eq. 7); the policy without its adapter is the reference."""
    batch = preference_batch(pairs, [1.0] * len(pairs), "shared", pad_id=0)
    with torch.no_grad(), model.disable_adapter():
        reference = loss_input(batch, scores_of(model, batch)).policy
    measured = replace(loss_input(batch, scores_of(model, batch)), reference=reference)
    loss: Tensor = preference_loss(measured, SigmoidLossBlock(beta=beta), LossState()).losses.mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main(
    path: str = "embedded:smollm2-135m",
    rounds: int = 3,
    prompts_per_round: int = 24,
    held_out: int = 16,
    candidates: int = 6,
    new_tokens: int = 48,
    learning_rate: float = 3e-4,
) -> None:
    """Print the held-out score before round 1 and after each."""
    torch.manual_seed(0)
    folder = resolve_model(path)
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_policy(folder, ModelBlock(path=path, dtype="float32", lora=LoraBlock()), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    prompts = load_prompts(PromptsBlock(source="embedded:review-topics", held_out=held_out), tokenizer, 256, seed=0)
    for index in range(rounds + 1):
        loss = 0.0
        for start in range(0, prompts_per_round if index else 0, 8):
            batch = draw(prompts.train, index, prompts_per_round, seed=0)[start : start + 8]
            answers = [c for prompt in batch for c in sample(model, tokenizer, prompt, candidates, new_tokens)]
            judged = [s for i, p in enumerate(batch) for s in score(p, answers[i * candidates : (i + 1) * candidates])]
            pairs = build_preferences(batch, answers, judged, BestWorstPairingBlock(min_margin=0.2), seed=index)
            loss = train_step(model, optimizer, pairs.preferences, beta=0.1) if pairs.preferences else loss
        after = [score(p, sample(model, tokenizer, p, 1, new_tokens))[0].value or 0.0 for p in prompts.held_out]
        print(f"round {index}: held-out score {fmean(after):.3f}" + (f", loss {loss:.3f}" if index else ""), flush=True)


if __name__ == "__main__":
    typer.run(main)
