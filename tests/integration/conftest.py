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
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return str(Path(folder))


@pytest.fixture(scope="module")
def resources() -> Iterator[dict[str, float]]:
    """A private Ray cluster for one test module; four logical CPUs whatever the machine has."""
    with cluster(num_cpus=4) as available:
        yield dict(available)
