"""The reference's checkpoint: which folder it is, and that it reads the policy's token ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from raylign.config import load_config
from raylign.config.blocks import ModelBlock
from raylign.config.reference import EmaReferenceBlock, InitialReferenceBlock, ModelReferenceBlock
from raylign.errors import ModelError
from raylign.reference.checkpoint import resolve_reference
from recipes.opening import online_run
from tests.unit.tiny_policy import save_policy, save_recipe


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return save_policy(tmp_path / "policy")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return save_policy(tmp_path / "other")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def vocabulary(folder: Path, **tokens: int | None) -> None:
    """Give tokens new ids, or take them away."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    kept = {token: number for token, number in (model["vocab"] | tokens).items() if number is not None}
    change(file, model=model | {"vocab": kept})


def found(policy: Path, reference: Path) -> str:
    return resolve_reference(ModelReferenceBlock(path=str(reference)), ModelBlock(), str(policy))


@pytest.mark.parametrize("block", [InitialReferenceBlock(), EmaReferenceBlock()])
def test_only_a_named_model_is_another_folder(block: Any, policy: Path) -> None:
    assert resolve_reference(block, ModelBlock(), str(policy)) == str(policy)


def test_the_same_vocabulary_is_accepted(policy: Path, other: Path) -> None:
    assert found(policy, other) == str(other)


def test_a_reference_may_know_more_tokens_and_pad_its_embedding_otherwise(policy: Path, other: Path) -> None:
    vocabulary(other, extra=9)
    change(other / "config.json", vocab_size=24)
    assert found(policy, other) == str(other)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"film": None}, "8 tokens: 1 of the policy's 9 are not in it, first 'film' with id 3"),
        ({"good": 2, "bad": 1}, "9 tokens: 2 of the policy's 9 are not in it, first 'good' with id 1"),
    ],
)
def test_other_tokens_are_refused(tokens: dict[str, int | None], message: str, policy: Path, other: Path) -> None:
    vocabulary(other, **tokens)
    with pytest.raises(ModelError, match=f"reference.path: {other} has another vocabulary of {message}; take a ref"):
        found(policy, other)


def test_too_few_embedding_rows_are_refused(policy: Path, other: Path) -> None:
    change(other / "config.json", vocab_size=8)
    with pytest.raises(ModelError, match="8 embedding rows, too few for the policy's token ids up to 8; take"):
        found(policy, other)


@pytest.mark.parametrize("rows", [16, 24])
def test_without_a_tokenizer_the_embeddings_are_compared(rows: int, policy: Path, other: Path) -> None:
    for file in other.glob("tokenizer*"):
        file.unlink()
    change(other / "config.json", vocab_size=rows)
    if rows == 16:
        assert found(policy, other) == str(other)
        return
    with pytest.raises(ModelError, match="24 embedding rows, the policy 16, and there are no two tokenizers"):
        found(policy, other)


def test_errors_name_the_option_of_the_reference(policy: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder .*; correct reference\.path"):
        found(policy, policy.parent / "nowhere")
    block = ModelReferenceBlock(path=str(policy), revision="main")
    with pytest.raises(ModelError, match=r"^reference\.revision=main has no meaning"):
        resolve_reference(block, ModelBlock(), str(policy))


def test_a_campaign_is_refused_before_it_leaves_anything(tmp_path: Path) -> None:
    recipe, other = save_recipe(tmp_path), save_policy(tmp_path / "other")
    vocabulary(other, film=None)
    config = load_config(recipe, ["reference.policy=model", f"reference.path={other}"])
    with pytest.raises(ModelError, match="has another vocabulary"), online_run(config):
        pytest.fail("started")
    assert not ray.is_initialized() and not (tmp_path / "runs").exists()
