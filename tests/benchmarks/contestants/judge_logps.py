"""Log-probs of given completions under any checkpoint: plain transformers in fp32, no code of either contestant."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from raylign.chunks import chunks
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.precision import LogpsJob, LogpsResult

_AT_ONCE = 8


def run(job: LogpsJob) -> LogpsResult:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = [(pair.prompt, completion) for pair in job.pairs for completion in (pair.chosen, pair.rejected)]
    sums: list[float] = []
    for some in chunks(rows, _AT_ONCE):
        sums += _logps(model, some).tolist()
    progress(f"{len(job.pairs)} pairs judged")
    return LogpsResult(chosen=tuple(sums[::2]), rejected=tuple(sums[1::2]))


def _logps(model: torch.nn.Module, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Padded on the right, which nothing causal sees."""
    ids = pad_sequence([torch.tensor([*prompt, *completion]) for prompt, completion in rows], batch_first=True)
    shortest = min(len(prompt) for prompt, _ in rows)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=ids.shape[1] - shortest + 1).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, shortest:, None]).squeeze(-1)
    places = torch.arange(shortest, ids.shape[1])
    own = torch.stack(
        [(places >= len(prompt)) & (places < len(prompt) + len(completion)) for prompt, completion in rows]
    )
    sums: Tensor = (logps * own).sum(-1)
    return sums


if __name__ == "__main__":
    contestant(run, LogpsJob)
