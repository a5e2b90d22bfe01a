"""Prompt sources row by row, with a tokenizer whose ids can be read off, and the draw of rounds."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raylign.config.blocks import PromptsBlock
from raylign.errors import PromptError
from raylign.models import load_tokenizer, resolve_model
from raylign.prompts import PromptSet, draw, load_prompts
from raylign.records import Prompt

WORDS = ("[UNK]", "</s>", "<user>", "<assistant>", "<system>", "red", "green", "blue", "be", "kind")
UNK, USER, ASSISTANT, SYSTEM, RED, GREEN, BLUE, BE, KIND = 0, 2, 3, 4, 5, 6, 7, 8, 9
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]", chat_template=TEMPLATE
    )


def load(
    tokenizer: PreTrainedTokenizerBase, path: Path | str, seed: int = 0, limit: int = 100, **block: Any
) -> PromptSet:
    options = {"source": str(path), "held_out": 1} | block
    return load_prompts(PromptsBlock.model_validate(options), tokenizer, limit, seed)


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def everything(prompts: PromptSet) -> list[Prompt]:
    return sorted([*prompts.train, *prompts.held_out], key=lambda prompt: prompt.id[1:])


def test_a_string_becomes_a_user_message_with_the_generation_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red green"}, {"prompt": "blue"})
    first, second = everything(load(tokenizer, path))
    assert first.messages == ({"role": "user", "content": "red green"},)
    assert first.token_ids == (USER, RED, GREEN, ASSISTANT)
    assert second.token_ids == (USER, BLUE, ASSISTANT)
    assert all(type(token) is int for token in first.token_ids)


def test_a_system_message_goes_before_prompts_that_have_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = [{"role": "system", "content": "red"}, {"role": "user", "content": "blue"}]
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "green"}, {"prompt": own})
    first, second = everything(load(tokenizer, path, system="be kind"))
    assert first.token_ids == (SYSTEM, BE, KIND, USER, GREEN, ASSISTANT)
    assert second.token_ids == (SYSTEM, RED, USER, BLUE, ASSISTANT)


def test_ids_follow_the_rows_and_other_columns_become_meta(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"prompt": "blue", "id": "../etc", "year": 1999, "score": 0.5, "seen": True, "note": None, "tags": ["x"]}
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red"}, "", row)
    prompts = everything(load(tokenizer, path))
    assert [prompt.id[1:] for prompt in prompts] == ["000001", "000003"]
    assert sorted(prompt.id[0] for prompt in prompts) == ["h", "p"]
    assert prompts[1].meta == {"id": "../etc", "year": 1999, "score": 0.5, "seen": True, "note": None}


def test_every_format_gives_the_same_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = ["red", "green", "red blue"]
    rows = [{"question": text} for text in texts]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "strings.json").write_text(json.dumps(texts))
    pq.write_table(pa.table({"question": texts}), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = [(USER, RED, ASSISTANT), (USER, GREEN, ASSISTANT), (USER, RED, BLUE, ASSISTANT)]
    for name in ("a.jsonl", "a.json", "strings.json", "a.parquet", "saved"):
        prompts = everything(load(tokenizer, tmp_path / name, column="question"))
        assert [prompt.token_ids for prompt in prompts] == expected, name


def test_arrow_fills_missing_message_keys_with_none_and_they_are_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    named = [{"role": "user", "content": "red", "name": "ann"}]
    plain = [{"role": "user", "content": "blue", "name": None}]
    pq.write_table(pa.table({"prompt": [named, plain]}), tmp_path / "p.parquet")
    first, second = everything(load(tokenizer, tmp_path / "p.parquet"))
    assert first.messages == ({"role": "user", "content": "red", "name": "ann"},)
    assert second.messages == ({"role": "user", "content": "blue"},)


def test_nested_columns_of_a_saved_data_set_are_not_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": index, "extra": {"a": 1}} for index, text in enumerate(["red", "blue"])]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [prompt.meta for prompt in everything(load(tokenizer, tmp_path / "saved"))] == [{"id": 0}, {"id": 1}]


def test_the_sources_own_held_out_split_is_used_from_its_start(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    parts = {
        "train": datasets.Dataset.from_list([{"prompt": text} for text in ("red", "green", "blue", "kind")]),
        "test": datasets.Dataset.from_list([{"prompt": text} for text in ("be red", "green", "be blue")]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    prompts = load(tokenizer, tmp_path / "saved", held_out=2)
    assert [prompt.id for prompt in prompts.held_out] == ["h000000", "h000001"]
    # "green" is held out, so it is not trained on; the unused third test row is.
    assert [prompt.id for prompt in prompts.train] == ["p000000", "p000002", "p000003"]


def test_another_split_and_a_misspelt_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"train": ["red"], "test": ["blue", "green"], "validation": ["kind"]}))
    prompts = load(tokenizer, tmp_path / "p.json", split="test")
    assert [prompt.token_ids[1] for prompt in prompts.train] == [BLUE, GREEN]
    assert [prompt.token_ids[1] for prompt in prompts.held_out] == [KIND]
    with pytest.raises(PromptError, match="no split 'tset'; did you mean 'test'"):
        load(tokenizer, tmp_path / "p.json", split="tset")


def test_held_out_prompts_are_a_seeded_draw_without_a_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = [" ".join([word] * count) for word in ("red", "green", "blue") for count in range(1, 8)]
    path = jsonl(tmp_path / "p.jsonl", *({"prompt": text} for text in texts))
    first, again, other = (load(tokenizer, path, held_out=6, seed=seed) for seed in (1, 1, 2))
    assert first == again and len(first.held_out) == 6 and len(first.train) == 15
    assert {prompt.id for prompt in first.held_out} != {prompt.id for prompt in other.held_out}
    assert not {prompt.token_ids for prompt in first.held_out} & {prompt.token_ids for prompt in first.train}
    numbers = [int(prompt.id[1:]) for prompt in everything(first)]
    assert numbers == list(range(1, 22))


def test_duplicates_after_templating_are_kept_once_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = [{"role": "user", "content": "red"}]
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red"}, {"prompt": same}, {"prompt": "red  "}, {"prompt": "blue"})
    with caplog.at_level(logging.INFO, logger="raylign.prompts.load"):
        prompts = everything(load(tokenizer, path))
    assert [prompt.id[1:] for prompt in prompts] == ["000001", "000004"]
    assert "2 exact duplicates left out of 4 prompts" in caplog.text


def test_the_digest_changes_with_any_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    digests = set()
    for index, texts in enumerate((["red", "green"], ["red", "green"], ["red", "blue"], ["green", "red"])):
        rows = [{"prompt": text} for text in texts]
        digests.add(load(tokenizer, jsonl(tmp_path / f"{index}.jsonl", *rows)).digest)
    assert len(digests) == 3


MESSAGE = {"role": "user", "content": "red"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"prompt": "red"', r"line 2: not a JSON row \(Expecting ',' delimiter"),
        ("[1]", r"line 2: not a JSON row \(list instead of an object\)"),
        ({"prompt": ""}, "line 2: the prompt is empty: ''"),
        ({"prompt": " \n"}, "line 2: the prompt is empty"),
        ({"prompt": None}, "line 2: no 'prompt'"),
        ({"other": "red"}, "line 2: no 'prompt'"),
        ({"prompt": 7}, "line 2: int instead of a string or a list of messages: 7"),
        ({"prompt": []}, "line 2: a conversation without messages"),
        ({"prompt": ["red"]}, "line 2: message 0 is a str"),
        ({"prompt": [{"content": "red"}]}, "line 2: message 0 has no role"),
        ({"prompt": [MESSAGE, {"role": "user"}]}, "line 2: message 1 has no content"),
        ({"prompt": [{"role": "human", "content": "red"}]}, "line 2: message 0 has unknown role 'human'"),
        ({"prompt": [{"role": "user", "content": ["red"]}]}, "line 2: content of message 0 is a list"),
        ({"prompt": [{"role": "user", "content": ""}]}, "line 2: content of message 0 is empty"),
        ({"prompt": [MESSAGE, {"role": "assistant", "content": "ok"}]}, "line 2: the last message is from assistant"),
        ({"prompt": [MESSAGE, {"role": "system", "content": "ok"}, MESSAGE]}, "refused by the chat template .*first"),
        ({"prompt": "red \ud800"}, "line 2: the prompt has half a surrogate pair at character 4"),
        ({"prompt": "red " * 99}, r"line 2: 101 tokens, limit 100: 'red red red"),
    ],
)
def test_a_bad_row_is_named_with_a_cure(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: object, complaint: str
) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red"}, row, {"prompt": "blue"})
    with pytest.raises(PromptError, match=f"(?s)1 of 3 rows cannot be used.*{complaint}.*cure: "):
        load(tokenizer, path)


def test_ten_bad_rows_are_shown_in_order_and_the_rest_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[object] = [{"prompt": ""} if number % 2 else "{" for number in range(1, 14)]
    with pytest.raises(PromptError) as caught:
        load(tokenizer, jsonl(tmp_path / "p.jsonl", *rows))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("p.jsonl: 13 of 13 rows cannot be used (lines counted from 1)")
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"line {number}" for number in range(1, 11)]
    assert lines[11] == "  and 3 more"
    assert lines[12:] == ["cure: write the text or remove the row; one JSON object per line"]


def test_long_prompts_are_listed_with_the_options_that_make_room(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red " * 7}, {"prompt": "red"}, {"prompt": "red " * 8})
    with pytest.raises(PromptError) as caught:
        load(tokenizer, path, limit=8)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines[1:3]] == ["9 tokens, limit 8", "10 tokens, limit 8"]
    assert lines[3].startswith("cure: raise generators.max_model_len, lower sampling.max_new_tokens, or shorten")
    assert len(load(tokenizer, path, limit=10).train) == 2


def test_a_row_cannot_forge_the_report(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"prompt": "\x1b[2J\n  line 9: fine " + "red " * 99}
    with pytest.raises(PromptError) as caught:
        load(tokenizer, jsonl(tmp_path / "p.jsonl", row))
    assert "\x1b" not in str(caught.value) and len(str(caught.value).splitlines()) == 3


def test_rows_of_other_formats_count_from_zero(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["red", "", None]}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"(?s)rows counted from 0\).*row 1: the prompt is empty.*row 2: no 'prompt'"):
        load(tokenizer, tmp_path / "p.parquet")


def test_a_missing_column_suggests_a_close_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompts": "red", "id": 1})
    with pytest.raises(PromptError, match="no column 'prompt'; did you mean 'prompts'"):
        load(tokenizer, path)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: no such file .*prompts\.source"),
        ("./nowhere", "no such file or folder"),
        ("embedded:review-topic", "did you mean 'review-topics'"),
    ],
)
def test_a_missing_source_is_named(tokenizer: PreTrainedTokenizerBase, source: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        load(tokenizer, source)


def test_files_that_are_not_what_they_seem(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    contents = {"empty.jsonl": b"\n", "latin.jsonl": b'{"prompt": "\xe9"}', "cut.json": b'["red"', "text.parquet": b"x"}
    complaints = {
        "empty.jsonl": "no rows",
        "latin.jsonl": "not UTF-8 at byte 12",
        "cut.json": "cannot be read",
        "text.parquet": "cannot be read",
        "object.json": "neither a list of rows nor an object of splits",
        "prompts.csv": "convert it",
        "folder": "save_to_disk",
    }
    contents |= {"object.json": b'{"prompt": "red"}', "prompts.csv": b"prompt\nred\n"}
    (tmp_path / "folder").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, complaint in complaints.items():
        with pytest.raises(PromptError, match=complaint):
            load(tokenizer, tmp_path / name)


def test_a_byte_order_mark_and_other_line_breaks_are_no_fault(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = '{"prompt": "red"}\r\n{"prompt": "blue\u2028blue"}\r\n'
    (tmp_path / "p.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [prompt.id[1:] for prompt in everything(load(tokenizer, tmp_path / "p.jsonl"))] == ["000001", "000002"]


def test_too_few_rows_to_leave_any_for_training(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "red"}, {"prompt": "blue"})
    with pytest.raises(PromptError, match=r"prompts\.held_out=2 leaves none of 2 different prompts"):
        load(tokenizer, path, held_out=2)
    (tmp_path / "same.json").write_text(json.dumps({"train": ["red"], "test": ["red"]}))
    with pytest.raises(PromptError, match="every prompt is also in its held-out split"):
        load(tokenizer, tmp_path / "same.json")


def test_a_hub_data_set_reads_only_the_splits_it_needs(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"train[:50%]": ["red", "blue"], "validation": ["green"]}

    def read(name: str, subset: str | None, *, data_dir: str | None, split: str, streaming: bool) -> datasets.Dataset:
        assert (name, subset, data_dir, streaming) == ("some-org/some-data", "main", None, False)
        return datasets.Dataset.from_list([{"prompt": text} for text in parts[split]])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *part, **more: ["train", "validation", "huge"])
    monkeypatch.setattr(datasets, "load_dataset", read)
    prompts = load(tokenizer, "some-org/some-data", split="train[:50%]", subset="main")
    assert [prompt.token_ids[1] for prompt in prompts.train] == [RED, BLUE]
    assert [prompt.token_ids[1] for prompt in prompts.held_out] == [GREEN]


def test_an_unreachable_hub_is_a_prompt_error(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*part: str, **more: str) -> list[str]:
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(PromptError, match=r"(?s)some-org/some-data: neither a file.*HF_HUB_OFFLINE"):
        load(tokenizer, "some-org/some-data")


def test_the_embedded_prompts_are_enough_different_and_short() -> None:
    smollm2 = load_tokenizer(resolve_model("embedded:smollm2-135m"))
    prompts = load(smollm2, "embedded:review-topics", held_out=32, limit=60)
    assert (len(prompts.train), len(prompts.held_out)) == (96, 32)
    assert len({prompt.messages[0]["content"] for prompt in everything(prompts)}) == 128
    assert (prompts.train[0].id, prompts.held_out[-1].id) == ("p000000", "h000031")
    assert load(smollm2, "embedded:review-topics", held_out=5).held_out == prompts.held_out[:5]


def numbered(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p{number:06d}", (), (number,)) for number in range(count))


@pytest.mark.parametrize(("size", "count"), [(96, 48), (10, 4), (7, 7), (7, 6), (5, 3), (9, 1)])
def test_rounds_use_every_prompt_once_before_any_twice(size: int, count: int) -> None:
    prompts = numbered(size)
    rounds = [[prompt.id for prompt in draw(prompts, index, count, seed=3)] for index in range(1, 4 * size + 1)]
    assert all(len(set(ids)) == count for ids in rounds)
    stream = [name for ids in rounds for name in ids]
    for start in range(0, len(stream) - size + 1, size):
        assert set(Counter(stream[start : start + size]).values()) == {1}


def test_a_draw_depends_on_its_arguments_alone() -> None:
    prompts = numbered(20)
    assert draw(prompts, 9, 6, seed=1) == draw(prompts, 9, 6, seed=1)
    assert draw(prompts, 9, 6, seed=1) != draw(prompts, 9, 6, seed=2)
    assert draw(prompts, 1, 20, seed=1) != draw(prompts, 2, 20, seed=1)


def test_a_round_larger_than_the_source_is_refused() -> None:
    with pytest.raises(PromptError, match=r"schedule\.prompts_per_round=4 exceeds the 3 training prompts"):
        draw(numbered(3), 1, 4, seed=0)
    with pytest.raises(ValueError, match="round_index=0"):
        draw(numbered(3), 0, 2, seed=0)
