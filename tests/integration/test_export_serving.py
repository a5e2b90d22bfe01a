"""An exported model answers like the run's policy: in plain transformers and in a fresh vLLM."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.calls import ask
from actors.generator.actor import EngineSpec
from actors.supervision.watch import get_all
from actors.weight_sync.transports import ShmTransport
from raylign.errors import GeneratorError
from raylign.export.card import Method, PolicyFacts, framework_versions
from raylign.export.policy import export_model
from raylign.records import Evaluation, Prompt
from raylign.roles import Generator
from raylign.sampling.decoding import Decoding
from tests.integration.engines import Engines
from tests.integration.tiny import START_S

pytestmark = pytest.mark.slow

_NEW = 24
_LOGP_TOLERANCE = 0.02
_QUESTIONS = ("What is the capital of France?", "Name a colour.", "Write one sentence about rain.")


def _facts() -> PolicyFacts:
    evaluation = Evaluation(0.8, 0.7, 0.9, 3.0, 40.0, 0.9, 0.2, 32, 0)
    return PolicyFacts(
        name="test",
        base_model="embedded:smollm2-135m",
        dataset="embedded:review-topics",
        method=Method("online DPO", "online DPO", ("dpo",)),
        rounds=1,
        evaluation=evaluation,
        confidence=0.95,
        versions=framework_versions(),
    )


def _adapter(base: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    policy.save_pretrained(str(folder))


def _greedy(model: Any, ids: tuple[int, ...]) -> list[int]:
    row = torch.tensor([ids])
    output = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=_NEW, do_sample=False)
    return [int(token) for token in output[0, len(ids) :]]


def _served(engines: Engines, folder: Path, prompts: list[Prompt]) -> list[tuple[list[int], list[float]]]:
    spec = EngineSpec(
        model=str(folder),
        dtype="float32",
        device="cpu",
        transport=ShmTransport.engine,
        lora_rank=0,
        tensor_parallel_size=1,
        max_model_len=256,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        kv_cache_gb=0.1,
        enforce_eager=True,
        sleeps=False,
        trust_remote_code=False,
        seed=0,
        threads=1,
        stacks=tempfile.gettempdir(),
    )
    generator = engines.remote(spec, "generator-0")
    decoding = Decoding(num_generations=1, max_new_tokens=_NEW, temperature=0.0, top_p=1.0, top_k=0)
    get_all([ask(generator, Generator.ready)], START_S, "starting", GeneratorError)
    asked = [ask(generator, Generator.sample, prompt, decoding, 0, 0) for prompt in prompts]
    found = [candidate for (candidate,) in get_all(asked, START_S, "sampling", GeneratorError)]
    get_all([ask(generator, Generator.shutdown)], START_S, "shutting down", GeneratorError)
    engines.give_back([generator])
    return [(list(candidate.token_ids), list(candidate.logprobs)) for candidate in found]


@pytest.fixture
def base(served_llama: str, tmp_path: Path) -> str:
    """Folder of a model whose weights are kept in bf16."""
    folder = str(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(served_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(served_llama).save_pretrained(folder)
    return folder


def test_merged_export_in_transformers_and_fresh_vllm(base: str, engines: Engines, tmp_path: Path) -> None:
    _adapter(base, tmp_path / "adapter")
    exported = export_model(tmp_path / "adapter", base, tmp_path / "merged", True, _facts())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    chats = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    ids = [tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    greedy = [_greedy(plain, row) for row in ids]

    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert greedy != [_greedy(before, row) for row in ids]
    adapter = PeftModel.from_pretrained(before, str(tmp_path / "adapter"))
    with torch.no_grad():
        gap = max((plain(torch.tensor([row])).logits - adapter(torch.tensor([row])).logits).abs().max() for row in ids)
    # The merge is exact in fp32 and rounded once to the model's bf16; without it the gap is 1.0.
    assert gap < 0.1

    served = _served(engines, exported, [Prompt(str(i), (), row) for i, row in enumerate(ids)])
    for row, expected, (tokens, logprobs) in zip(ids, greedy, served, strict=True):
        assert tokens == expected[: len(tokens)]
        whole = torch.tensor([[*row, *tokens]])
        with torch.no_grad():
            logps = plain(whole).logits[0, len(row) - 1 : -1].log_softmax(-1)
        reference = logps.gather(-1, whole[0, len(row) :, None])[:, 0]
        assert torch.tensor(logprobs) == pytest.approx(reference, abs=_LOGP_TOLERANCE)
