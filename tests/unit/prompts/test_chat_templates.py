"""`model.chat_template`: a file in place of the model's own template, checked at the start and exported with it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from raylign.boundary import template_limits
from raylign.config import dump_config, load_config, parse_config
from raylign.config.blocks import PromptsBlock
from raylign.errors import ModelError
from raylign.export.policy import export_model
from raylign.models import end_ids, load_tokenizer
from raylign.prompts import load_prompts
from raylign.run.directory import differences
from tests.unit.export.test_export import FACTS
from tests.unit.tiny_policy import save_policy, save_recipe

GOOD, FILM, ONE, TWO, EOS = 1, 3, 4, 5, 7
MINE = (
    "{% for m in messages %}one {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}two{% endif %}"
)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return save_policy(tmp_path / "policy")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.jinja").write_text(MINE)
    return tmp_path / "mine.jinja"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{% for", r"mine\.jinja: not a chat template .*correct model\.chat_template"),
        (b"{{ 1 + messages[0].content }}", "not a chat template"),
        (b"{{ raise_exception('never') }}", r"not a chat template \(never\)"),
        (b"{{ 'always the same' }}", "does not write the user's message"),
        (b"{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing for add_generation_prompt"),
        (b"\xff", r"cannot be read .*UTF-8 \(model\.chat_template\)"),
        (None, r"cannot be read .*No such file"),
    ],
)
def test_a_file_is_checked(content: bytes | None, problem: str, policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        load_tokenizer(str(policy), chat_template=path)


ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 1 s of CPU time",
    "{{ 9 ** (9 ** 9) }}": "takes more than 1 s of CPU time",
    "{{ 'a' * 10 ** 10 }}": "takes more than 512 MiB",
    "{{ 'a' * 10 ** 7 }}": "writes more than 1 Mi characters",
}


@pytest.mark.parametrize("place", ["file", "model"])
@pytest.mark.parametrize(("piece", "problem"), ENDLESS.items())
def test_one_without_end_is_refused(
    piece: str, problem: str, place: str, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CPU" in problem:
        monkeypatch.setattr(template_limits, "CPU_S", 1)
    path = policy / "chat_template.jinja" if place == "model" else tmp_path / "mine.jinja"
    path.write_text(MINE + piece)
    with pytest.raises(ModelError, match=rf"{problem} for a conversation of a few words; correct"):
        load_tokenizer(str(policy), chat_template=None if place == "model" else path)


def test_one_that_only_takes_some_conversations_is_no_endless_one(policy: Path, tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' or messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "mine.jinja").write_text(strict + MINE + "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}")
    tokenizer = load_tokenizer(str(policy), chat_template=tmp_path / "mine.jinja")
    assert "{% generation %}" in str(tokenizer.chat_template)


def test_prompts_are_written_by_it(policy: Path, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "film"}\n{"prompt": "good"}\n')
    block = PromptsBlock(source=str(tmp_path / "prompts.jsonl"), held_out=1)
    prompts = load_prompts(block, load_tokenizer(str(policy), chat_template=mine), 10, seed=0)
    assert {row.token_ids for row in (*prompts.train, *prompts.held_out)} == {
        (ONE, FILM, EOS, TWO),
        (ONE, GOOD, EOS, TWO),
    }


def test_a_model_without_a_template_takes_it(policy: Path, mine: Path) -> None:
    (policy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*model\.chat_template"):
        load_tokenizer(str(policy))
    assert load_tokenizer(str(policy), chat_template=mine).chat_template == MINE


def test_the_exported_model_has_it(policy: Path, mine: Path, tmp_path: Path) -> None:
    """Also where the model keeps its own in the tokenizer's config."""
    (policy / "chat_template.jinja").unlink()
    config = json.loads((policy / "tokenizer_config.json").read_text())
    (policy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "its own"}))
    own = export_model(policy, str(policy), tmp_path / "own", merge=False, card=FACTS)
    to = export_model(policy, str(policy), tmp_path / "out", merge=False, card=FACTS, chat_template=mine)
    assert AutoTokenizer.from_pretrained(own).chat_template == "its own"
    assert AutoTokenizer.from_pretrained(to).chat_template == MINE


def test_a_recipe_keeps_its_path(tmp_path: Path) -> None:
    recipe = save_recipe(tmp_path)
    config = load_config(recipe, ["model.chat_template=mine.jinja"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config and config.model.chat_template == Path("mine.jinja")
    assert differences(load_config(recipe), config) == ["model.chat_template: None -> mine.jinja"]
    assert parse_config({}).model.chat_template is None


def test_ends_are_those_of_tokenizer_and_model(policy: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(policy))
    (policy / "config.json").write_text('{"eos_token_id": 4}')
    (policy / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert end_ids(tokenizer, [policy, tmp_path / "nowhere"]) == {EOS, 3}
    (policy / "generation_config.json").unlink()
    assert end_ids(tokenizer, [policy]) == {EOS, 4}
    (policy / "config.json").write_text('{"eos_token_id": null}')
    assert end_ids(tokenizer, [policy]) == {EOS}


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "not a JSON object"), ('{"eos_token_id": "x"}', "neither an id")]
)
def test_ends_that_cannot_be_read(content: str, problem: str, policy: Path) -> None:
    tokenizer = load_tokenizer(str(policy))
    (policy / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=f"generation_config.json: .*{problem}"):
        end_ids(tokenizer, [policy])
