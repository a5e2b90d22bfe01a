"""One Ray cluster for all in-process integration tests, and small models to run on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors.cluster import cluster
from raylign.models import resolve_model


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the embedded SmolLM2-135M-Instruct."""
    return resolve_model("embedded:smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """A random 2-layer Llama with tied embeddings and SmolLM2's tokenizer; loads in a blink."""
    return _random_llama(tmp_path_factory.mktemp("tiny-llama"), smollm2, width=32, spread=0.2)


@pytest.fixture(scope="session")
def served_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """The same with heads as wide as vLLM asks."""
    return _random_llama(tmp_path_factory.mktemp("served-llama"), smollm2, width=128, spread=0.1)


def _random_llama(folder: Path, tokenizer: str, *, width: int, spread: float) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def resources() -> Iterator[dict[str, float]]:
    """A private Ray cluster for one test module; four logical CPUs whatever the machine has."""
    with cluster(num_cpus=4) as available:
        yield dict(available)
