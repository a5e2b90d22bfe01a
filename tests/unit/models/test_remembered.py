"""What was found out of a model is not asked twice, and asked again when anything of it is another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError
from raylign.models import remembered as module
from raylign.models.remembered import remembered
from tests.unit.boundary.test_security import edit_json
from tests.unit.tiny_policy import save_policy

asked: list[str] = []


def count(folder: str) -> int:
    asked.append(folder)
    return len(asked)


def refuse(folder: str) -> None:
    asked.append(folder)
    raise ModelError(f"{folder}: cannot be used")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    asked.clear()
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(save_policy(tmp_path / "policy"))


def answer(folder: str, block: ModelBlock | None = None, what: str = "") -> int:
    return remembered((folder,), block or ModelBlock(path=folder), what, count, folder)()


def test_the_same_question_is_asked_once(folder: str) -> None:
    assert [answer(folder), answer(folder)] == [1, 1]


def test_the_same_files_elsewhere_are_the_same(folder: str, tmp_path: Path) -> None:
    other = Path(folder).rename(tmp_path / "elsewhere")
    assert [answer(str(other)), answer(str(other), ModelBlock(path="hub/name", revision="main"))] == [1, 1]


def test_another_option_question_or_function_is_asked_anew(folder: str) -> None:
    first = answer(folder)
    lora = answer(folder, ModelBlock(path=folder, lora=LoraBlock(r=2)))
    more = answer(folder, ModelBlock(path=folder, lora=LoraBlock(r=4)))
    assert (first, lora, more, answer(folder, what="reward model")) == (1, 2, 3, 4)
    remembered((folder, folder), ModelBlock(path=folder), "", count, folder)()
    assert len(asked) == 5


def test_another_config_or_other_shapes_are_asked_anew(folder: str, tmp_path: Path) -> None:
    answer(folder)
    edit_json(Path(folder) / "config.json", max_position_embeddings=32)
    assert answer(folder) == 2
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    weights = Path(folder) / "model.safetensors"
    tensors = load_file(weights)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name][:4].clone()}, weights, metadata={"format": "pt"})
    assert answer(folder) == 3


def test_other_versions_of_the_libraries_or_our_code_are_asked_anew(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(folder)
    own = module._versions()
    monkeypatch.setattr(module, "_versions", lambda: [*own[:-1], "another"])
    assert answer(folder) == 2


def test_another_function_of_the_same_name_is_asked_anew(folder: str, tmp_path: Path) -> None:
    """As after an edit of its file."""
    block = ModelBlock(path=folder)
    for number in (1, 2):
        file = tmp_path / "asks.py"
        file.write_text(f"def look(folder):\n    return {number}\n")
        names: dict[str, Callable[[str], int]] = {}
        exec(compile(file.read_text(), file, "exec"), names)
        assert remembered((folder,), block, "", names["look"], folder)() == number


def test_our_code_that_looks_at_models_counts() -> None:
    root = Path(module.__file__).parents[1]
    assert len(module._versions()) == 3 + sum(len(list((root / name).rglob("*.py"))) for name in ("models", "training"))


def test_a_refusal_is_not_kept(folder: str, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot be used"):
            remembered((folder,), ModelBlock(path=folder), "", refuse, folder)()
    assert len(asked) == 2 and not cache.exists()


def test_a_model_with_code_of_its_own_is_looked_at_every_time(folder: str) -> None:
    block = ModelBlock(path=folder, trust_remote_code=True)
    assert [answer(folder, block), answer(folder, block)] == [1, 2]


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}"])
def test_a_damaged_answer_is_asked_anew_and_written_again(folder: str, cache: Path, content: str) -> None:
    answer(folder)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert answer(folder) == 2
    assert json.loads(file.read_text()) == {"answer": 2}


def test_a_cache_that_cannot_be_written_keeps_nothing_and_stops_nothing(folder: str, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert [answer(folder), answer(folder)] == [1, 2]
