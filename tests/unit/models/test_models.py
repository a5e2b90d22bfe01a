"""Model paths, tokenizers and policies, on a model of a few thousand weights."""

import json
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError
from raylign.models import context_limit, load_tokenizer, resolve, resolve_model
from raylign.models.load import load_policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=77,
        attention_dropout=0.5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def refusal(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))


def save_tokenizer(folder: Path, **special: str) -> None:
    backend = Tokenizer(models.WordLevel({"hi": 0, "</s>": 1, "<pad>": 2}, unk_token="hi"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def test_a_local_folder_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_model("./tiny") == resolve_model("tiny") == str(folder.resolve())


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_missing_path_is_named(path: str) -> None:
    with pytest.raises(ModelError, match=r"nowhere.*: no such folder.*model\.path"):
        resolve_model(path)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="revision=main has no meaning"):
        resolve_model(str(folder), revision="main")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin: pickled weights can run code"):
        resolve_model(str(folder))


def test_an_adapter_alone_is_sent_to_export(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="raylign export"):
        resolve_model(str(folder))


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        resolve_model(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="1 of 2 shards missing, first model-00002"):
        resolve_model(str(folder))


def test_a_hub_id_is_downloaded_without_pickles_at_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(resolve, "snapshot_download", download)
    assert resolve_model("some-org/some-model", revision="abc") == str(folder.resolve())
    assert (asked["repo_id"], asked["revision"]) == ("some-org/some-model", "abc")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    names = ("pytorch_model.bin", "model.pt", "modeling.py", "model.safetensors", "config.json")
    accepted = [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]
    assert accepted == ["model.safetensors", "config.json"]


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (LocalEntryNotFoundError("offline"), "hub cannot be reached.*HF_HUB_OFFLINE"),
        (RepositoryNotFoundError("404", response=refusal(404)), "the hub has no model.*correct model.path"),
        (GatedRepoError("403", response=refusal(403)), "gated.*HF_TOKEN"),
        (OSError(28, "No space left on device"), "No space left.*run again"),
    ],
)
def test_hub_failures_become_model_errors(error: Exception, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(ModelError, match=cure):
        resolve_model("some-org/some-model")


def test_a_malformed_hub_id_needs_no_network() -> None:
    with pytest.raises(ModelError, match="neither a folder that exists nor a hub id"):
        resolve_model("not a model!")


def test_the_pad_token_falls_back_to_eos(folder: Path) -> None:
    save_tokenizer(folder, eos_token="</s>", chat_template="{{ messages }}")
    assert load_tokenizer(str(folder)).pad_token_id == 1


def test_a_pad_token_of_its_own_stays(folder: Path) -> None:
    save_tokenizer(folder, eos_token="</s>", pad_token="<pad>", chat_template="{{ messages }}")
    assert load_tokenizer(str(folder)).pad_token_id == 2


def test_a_tokenizer_needs_a_chat_template_and_an_eos(folder: Path) -> None:
    save_tokenizer(folder, eos_token="</s>")
    with pytest.raises(ModelError, match=r"no chat template.*model.chat_template"):
        load_tokenizer(str(folder))
    save_tokenizer(folder, chat_template="{{ messages }}")
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(str(folder))


def test_context_limit_is_the_number_of_positions(folder: Path) -> None:
    assert context_limit(str(folder)) == 77


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_policy_has_the_dtype_asked_for_and_no_dropout(folder: Path, name: str, dtype: torch.dtype) -> None:
    block = ModelBlock.model_validate({"path": str(folder), "dtype": name})
    model = load_policy(str(folder), block, seed=0)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad for weight in model.parameters())
    tokens = torch.arange(6)[None]
    model.train()
    first, second = model(tokens).logits, model(tokens).logits
    assert torch.equal(first, second)


def test_missing_weights_are_refused_instead_of_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in the files, first model\.layers\.1\.mlp\.up_proj"):
        load_policy(str(folder), ModelBlock(), seed=0)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 10}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(str(folder), ModelBlock(), seed=0)


def adapter(model: object) -> dict[str, torch.Tensor]:
    assert isinstance(model, PeftModel)
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def test_an_adapter_covers_every_linear_layer_in_the_compute_dtype(folder: Path) -> None:
    weights = adapter(load_policy(str(folder), ModelBlock(lora=LoraBlock(r=3)), seed=0))
    assert len(weights) == 2 * 7 * 2  # layers x linear layers x (A, B); the output head stays out
    assert all("lora_" in name and weight.dtype == torch.bfloat16 for name, weight in weights.items())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert weights[name].shape == (3, 8)
    assert all(not weight.any() for name, weight in weights.items() if "lora_B" in name)


def test_an_adapter_depends_on_the_seed_alone(folder: Path) -> None:
    block = ModelBlock(lora=LoraBlock(r=2))
    torch.manual_seed(1)
    first = adapter(load_policy(str(folder), block, seed=5))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, other = (adapter(load_policy(str(folder), block, seed=seed)) for seed in (5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_named_modules_are_targeted_and_a_misspelt_one_is_refused(folder: Path) -> None:
    weights = adapter(load_policy(str(folder), ModelBlock(lora=LoraBlock(target_modules=("q_proj", "v_proj"))), seed=0))
    assert {name.split(".")[-4] for name in weights} == {"q_proj", "v_proj"} and len(weights) == 8
    with pytest.raises(ModelError, match="no layer is named 'k_prj'; did you mean 'k_proj'"):
        load_policy(str(folder), ModelBlock(lora=LoraBlock(target_modules=("q_proj", "k_prj"))), seed=0)
