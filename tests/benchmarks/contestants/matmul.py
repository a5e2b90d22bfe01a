"""How fast this machine multiplies bf16 matrices of a model's shapes."""

import torch
from transformers import AutoConfig

from tests.benchmarks.harness.children import contestant
from tests.benchmarks.harness.dpo import RateJob, RateResult
from tests.benchmarks.harness.flops import matmul_rate


def run(job: RateJob) -> RateResult:
    torch.set_num_threads(job.threads)
    device = torch.device("cuda" if job.on_gpu else "cpu")
    return RateResult(flops=matmul_rate(AutoConfig.from_pretrained(job.folder), job.tokens, device))


if __name__ == "__main__":
    contestant(run, RateJob)
