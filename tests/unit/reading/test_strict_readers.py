"""Text with two meanings, numbers that nothing holds, and files without an end: refused before anything starts."""

import base64
import datetime
import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from raylign.config import OnlineDpoConfig, load_config, parse_config
from raylign.config.blocks import PromptsBlock
from raylign.config.data import SourceBlock
from raylign.data.rows import read_examples
from raylign.errors import ConfigError, DataError, ModelError, PromptError
from raylign.models import load_tokenizer, resolve_model
from raylign.models.open import read_chat_template
from raylign.prompts import PromptSet, load_prompts
from raylign.prompts.tables import Fault
from raylign.reading import Refused, files, plain_problem
from raylign.reading.json_text import parse_json
from raylign.reading.yaml_text import parse_yaml
from tests.faults import record
from tests.unit.tiny_policy import save_policy

DEEP = 5000
ROOT = Path(__file__).resolve().parents[3]
READ_HERE = re.compile(r"json\.loads?\(|yaml\.\w*load|gzip\.|pq\.read|\.read_text\(")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def tokenizer(policy: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(policy))


def refused_recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "recipe.yaml")
    assert str(caught.value).startswith(f"{folder / 'recipe.yaml'}: ")
    return str(caught.value)


def refused_override(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({}, overrides)
    return str(caught.value)


TWO_MEANINGS = {
    "trainer: {learning_rate: 1e-5}\nrun: {seed: 1}\ntrainer: {ranks: 2}\n": "line 3: the key 'trainer' is there twice",
    "run:\n  seed: 1\n  seed: 2\n": "line 3: the key 'seed' is there twice; leave one of them",
    "schedule:\n  rounds: 010\n": "line 2: '010' is another number to another version of YAML; write it as a decimal",
    "trainer: {step_timeout_s: 1:30}": "line 1: '1:30' is another number",
    "trainer: {step_timeout_s: 1:30.5}": "line 1: '1:30.5' is another number",
    "trainer: {max_tokens_per_micro_batch: 8_192}": "line 1: '8_192' is another number",
    "run: {no: 1}": "line 1: the key 'no' is no text; put it in quotes",
    "? [a, b]\n: 1\n": "line 1: the key of several parts is no text",
    f"run: {{seed: {'9' * DEEP}}}": "line 1: an integer of 5,000 digits; give a smaller one",
    f"run: {{seed: 0x{'f' * DEEP}}}": "line 1: an integer of 5,002 digits",
    f"run: {'[' * DEEP}": "line 1: nested more than 32 levels deep; give it flatter",
    "run: &a [*a]": "line 1: a value that holds itself",
    "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n": "line 5: more values than any recipe has",
    f"x: {'y' * (300 << 10)}": "longer than 256 KiB; give a shorter file",
}


@pytest.mark.fault
def test_a_recipe_has_one_meaning_in_every_version_of_yaml(tmp_path: Path) -> None:
    for text, complaint in TWO_MEANINGS.items():
        assert complaint in refused_recipe(tmp_path, text), text[:80]
    record(
        "a recipe of two meanings", f"{len(TWO_MEANINGS)} kinds: keys twice, 010, 1:30, bombs", lost="nothing: refused"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("!!python/name:os.system", "the tag"),
        ("!!binary aGk=", "the tag"),
        ("!!bool maybe", "the tag"),
        ("!!float abc", "the tag"),
        (r'"\UFFFFFFFF"', "too large"),
        ("%YAML " + "9" * DEEP + ".1\n--- a", ""),
        ("a\n--- b\n--- c", "single document"),
    ],
)
def test_what_is_no_plain_yaml_is_an_error_of_yaml(tmp_path: Path, text: str, complaint: str) -> None:
    message = refused_recipe(tmp_path, text)
    assert "not valid YAML: " in message and complaint in message


def test_dates_and_quoted_numbers_stay_text() -> None:
    assert parse_yaml("a: 2026-11-28\nb: '010'\nc: 2026-11-28T10:00:00Z") == {
        "a": "2026-11-28",
        "b": "010",
        "c": "2026-11-28T10:00:00Z",
    }
    assert parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}")["y"] == {"a": 1, "b": 3}
    assert parse_config({}, ["run.name=2026-11-28"]).run.name == "2026-11-28"
    assert parse_yaml("[0, -7, +3, 0x1F, 1.5e+3, .inf, true, null, ~]")[:5] == [0, -7, 3, 31, 1500.0]
    assert parse_yaml("# nothing") is None


def test_overrides_are_read_as_strictly() -> None:
    assert "'schedule.rounds=010': line 1: '010' is another number" in refused_override("schedule.rounds=010")
    assert "the key 'r' is there twice" in refused_override("model.lora={r: 1, r: 2}")
    assert "a name of 5000 parts" in refused_override(".".join(["x"] * DEEP) + "=1")
    assert len(refused_override("run.seed=[" + "x" * 10_000 + "]")) < 1000


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.seed=100000000000000000000000", "an integer of 24 digits"),
        ("run.seed=10000000000000000000", "run.seed: Input should be less than or equal to 4294967295"),
        ("run.seed=4294967296", "run.seed: Input should be less than or equal to 4294967295"),
        ("trainer.ranks=2147483648", "trainer.ranks: 2147483648 is more than 2,147,483,647; give a smaller number"),
        ("sampling.top_k=10000000000", "sampling.top_k: 10000000000 is more than"),
        ("trainer.learning_rate=1e-60", "trainer.learning_rate: 1e-60 is not within 1.2e-38 to 3.4e+38"),
        ("trainer.learning_rate=1e60", "trainer.learning_rate: 1e+60 is not within"),
        ("trainer.step_timeout_s=1e12", "trainer.step_timeout_s: 1e+12 is not within 1.2e-38 to 1e+08"),
        (
            "loss={loss_type: mix, losses: [{loss_type: sft}, {loss_type: ipo}], loss_weights: [1, 1e60]}",
            "loss.loss_weights: 1e+60 is not within",
        ),
    ],
)
def test_numbers_beyond_what_they_become_are_refused(override: str, complaint: str) -> None:
    assert complaint in refused_override(override)


def test_numbers_given_in_python_are_held_to_the_same_limits() -> None:
    with pytest.raises(ConfigError, match="run.seed: Input should be less than or equal to 4294967295"):
        parse_config({"run": {"seed": 10**23}})
    with pytest.raises(ConfigError, match="a int too large to show"):
        parse_config({"run": {"seed": 10**DEEP}})
    assert parse_config({"run": {"seed": (1 << 32) - 1}}).run.seed == (1 << 32) - 1
    assert OnlineDpoConfig() == parse_config({})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice; leave one of them"),
        ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "the key 'c' is there twice"),
        ("9" * DEEP, "an integer of 5,000 digits; give a smaller one"),
        ("[-9223372036854775809]", "an integer beyond 64 bits; give a smaller one"),
        ("18446744073709551616", "an integer beyond 64 bits"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ("[" * DEEP + "]" * DEEP, "nested more than 64 levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 levels deep"),
    ],
)
def test_json_of_two_meanings_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_json(text)
    assert complaint in str(caught.value)


def test_other_json_is_what_it_was() -> None:
    text = '{"a": [1, -2, 1.5, true, null, "\\u00e9"], "b": {"a": 18446744073709551615}, "c": -9223372036854775808}'
    assert parse_json(f" {text}\n") == json.loads(text)
    assert parse_json("1" + "0" * 30, digits=100) == 10**30
    assert parse_json("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)
    assert parse_json(json.dumps([[[]]] * 100)) == [[[]]] * 100
    for broken in ("", "{", '{"a": 1} x', "[1,]"):
        with pytest.raises(json.JSONDecodeError):
            parse_json(broken)


PAIR = '{"prompt": "say", "chosen": "good", "rejected": "bad"}'
SWAPPED = '{"prompt": "say", "chosen": "bad", "rejected": "bad", "chosen": "good"}'
DEEP_ROW = f'{{"prompt": "say", "chosen": "good", "rejected": "bad", "x": {"[" * 70 + "]" * 70}}}'
HUGE_ROW = f'{{"prompt": "say", "chosen": "good", "rejected": "bad", "score": {"7" * DEEP}}}'
FLAWS = {
    SWAPPED: "the key 'chosen' is there twice",
    DEEP_ROW: "nested more than 64 levels deep",
    HUGE_ROW: "an integer of 5,000 digits",
}


@pytest.mark.fault
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "splits.json", "rows.jsonl.gz"])
def test_a_row_with_a_flaw_is_named_and_the_others_are_kept(tmp_path: Path, name: str) -> None:
    rows = [PAIR, *(row for flaw in FLAWS for row in (flaw, PAIR))]
    text = "\n".join(rows) if "jsonl" in name else f"[{', '.join(rows)}]"
    text = f'{{"train": {text}}}' if "splits" in name else text
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = list(read_examples(SourceBlock(source=str(tmp_path / name))))
    first = 1 if "jsonl" in name else 0
    faults = [item for item in found if isinstance(item, Fault)]
    assert [fault.number - first for fault in faults] == [1, 3, 5] and len(found) == 7
    assert [fault.problem for fault in faults] == list(FLAWS.values())
    assert all(fault.cure and str(fault.value).startswith('{"prompt": "say"') for fault in faults)
    record(
        "rows of two meanings", f"keys twice, 5,000 digits, 70 levels in {name}", lost="those rows, named with a cure"
    )


def test_prompts_with_a_flaw_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    flaw = '{"prompt": "good", "prompt": "bad"}'
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "say"}}\n{flaw}\n')
    (tmp_path / "p.json").write_text(f'["say", {flaw}]')
    for name, place in (("p.jsonl", "line 2"), ("p.json", "row 1")):
        with pytest.raises(PromptError, match=f"(?s){place}: the key 'prompt' is there twice.*cure: leave one of them"):
            load(tokenizer, tmp_path / name)


def test_a_split_that_is_there_twice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "p.json").write_text(f'{{"train": [{PAIR}], "test": [], "train": [{PAIR}]}}')
    with pytest.raises(PromptError, match="p.json: the split 'train' is there twice; leave one of them"):
        load(tokenizer, tmp_path / "p.json")
    with pytest.raises(DataError, match="the split 'train' is there twice"):
        list(read_examples(SourceBlock(source=str(tmp_path / "p.json"))))


def load(tokenizer: PreTrainedTokenizerBase, path: Path, **block: Any) -> PromptSet:
    return load_prompts(PromptsBlock.model_validate({"source": str(path), "held_out": 1} | block), tokenizer, 50, 0)


def test_columns_of_one_name_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = pa.array(["say", "say good"])
    table = pa.table([text, text, text, text], names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'chosen' is there 2 times; leave one of them"):
        read_examples(SourceBlock(source=str(tmp_path / "a.parquet")))
    with pytest.raises(PromptError, match="the column 'chosen' is there 2 times"):
        load(tokenizer, tmp_path / "a.parquet")


def test_fields_of_one_name_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = pa.array(["user", "user"])
    message = pa.StructArray.from_arrays([text, text, text], names=["role", "content", "role"])
    pq.write_table(pa.table({"prompt": pa.ListArray.from_arrays([0, 1, 2], message)}), tmp_path / "a.parquet")
    with pytest.raises(PromptError, match="the field of column 'prompt' 'role' is there 2 times"):
        load(tokenizer, tmp_path / "a.parquet")


ODD: dict[str, Any] = {
    "datetime": datetime.datetime(2026, 1, 2),
    "date": datetime.date(2026, 1, 2),
    "bytes": b"\xff",
    "timedelta": datetime.timedelta(1),
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", ODD)
def test_values_that_json_does_not_have_are_refused_in_messages(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    message = {"role": "user", "content": "good", "sent": ODD[kind]}
    pq.write_table(pa.table({"prompt": [[message], [message | {"sent": None}]]}), tmp_path / "p.parquet")
    problem = rf"row 0: message 0\.sent is a {kind}, which JSON does not have"
    with pytest.raises(PromptError, match=f"(?s)1 of 2 rows.*{problem}.*cure: give text, a number or a boolean"):
        load(tokenizer, tmp_path / "p.parquet")
    pairs = {"prompt": [[message]] * 2, "chosen": ["good"] * 2, "rejected": ["bad"] * 2}
    pq.write_table(pa.table(pairs), tmp_path / "d.parquet")
    for fault in read_examples(SourceBlock(source=str(tmp_path / "d.parquet"))):
        assert isinstance(fault, Fault) and fault.problem == f"message 0.sent is a {kind}, which JSON does not have"
    record(
        "a value that JSON does not have in a message",
        f"a {kind} in a Parquet column",
        lost="nothing: refused before the start",
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1, {"b": float("nan")}]}, "it.a[1].b is nan"),
        ({"a": float("inf")}, "it.a is inf"),
        ({"a": "\ud800"}, "it.a has half a surrogate pair at character 0"),
        ({"\ud800": 1}, "a key of it has half a surrogate pair at character 0"),
        ({1: 2}, "it has the key 1, which is no text"),
        ({"a": 1 << 64}, "it.a is an integer beyond 64 bits"),
        ({"a": (1, 2)}, "it.a is a tuple, which JSON does not have"),
    ],
)
def test_what_is_not_plain_is_named_by_its_place(value: object, problem: str) -> None:
    found, cure = plain_problem("it", value)
    assert found == problem and cure


def test_a_value_of_any_depth_is_looked_at_without_recursion() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert plain_problem("it", deep)[0] == "it is nested more than 64 levels deep"
    assert plain_problem("it", json.loads("[" * 64 + "]" * 64)) == ("", "")


def kinds(folder: Path) -> dict[str, Path]:
    """Paths that a library would wait for, or read without end."""
    paths = {name: folder / name for name in ("p.jsonl", "p.json", "p.parquet", "recipe.yaml", "template.jinja")}
    for path in paths.values():
        os.mkfifo(path)
    return paths


@pytest.mark.fault
def test_pipes_are_refused_instead_of_waited_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    paths = kinds(tmp_path)
    for name in ("p.jsonl", "p.json", "p.parquet"):
        complaint = f"{name} is a pipe, not a file; write what it gives to a file, and name that"
        with pytest.raises(PromptError, match=complaint):
            load(tokenizer, paths[name])
        with pytest.raises(DataError, match=complaint):
            list(read_examples(SourceBlock(source=str(paths[name]))))
    with pytest.raises(ConfigError, match=r"recipe\.yaml is a pipe"):
        load_config(paths["recipe.yaml"])
    with pytest.raises(ModelError, match=r"template\.jinja is a pipe"):
        read_chat_template(paths["template.jinja"])
    with pytest.raises(ConfigError, match="zero is a device"):
        load_config(Path("/dev/zero"))
    record("a pipe as recipe, prompts, template", "mkfifo of each name", lost="nothing: refused at once")


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "good"}, {"prompt": "bad"}]).save_to_disk(str(saved))
    (saved / "state.json").unlink()
    os.mkfifo(saved / "state.json")
    with pytest.raises(PromptError, match=r"state\.json is a pipe"):
        load(tokenizer, saved)
    with pytest.raises(DataError, match=r"state\.json is a pipe"):
        read_examples(SourceBlock(source=str(saved)))
    folder = save_policy(tmp_path / "policy")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a pipe"):
        resolve_model(str(folder))


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["one line", "one value", "blank lines", "blanks in an array"])
def test_a_packed_bomb_is_refused_within_little_memory(tmp_path: Path, kind: str) -> None:
    is_lines = kind in ("one line", "blank lines")
    path = tmp_path / f"bomb.{'jsonl' if is_lines else 'json'}.gz"
    filler = {"one line": b"a", "one value": b"a", "blank lines": b"\n", "blanks in an array": b" "}[kind]
    with gzip.open(path, "wb", compresslevel=9) as packed:
        packed.write({"one line": b'{"prompt": "', "one value": b'[{"prompt": "'}.get(kind, b"" if is_lines else b"["))
        for _ in range(48):
            packed.write(filler * (1 << 20))
    assert path.stat().st_size < 1 << 20
    if kind in ("one line", "one value"):
        tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb.* (become .* times as many; unpack it|is longer than 16 MiB; give)"):
        list(read_examples(SourceBlock(source=str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20, f"{peak:,} bytes for a file of {path.stat().st_size:,}"
    record("a gzip bomb, 48 MiB in less than 1 MiB", kind, lost="nothing: refused")


def test_a_long_row_is_refused_in_any_format(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("files", "json_text", "arrow"):
        monkeypatch.setattr(f"raylign.reading.{module}.LONGEST_ROW", 1 << 20)
    long = base64.b64encode(os.urandom(2 << 20)).decode()
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": long}))
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": long}]))
    pq.write_table(pa.table({"prompt": [long]}), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.json", "p.parquet"):
        with pytest.raises(PromptError, match="longer than 1 MiB.*; give "):
            load(tokenizer, tmp_path / name)


def test_packed_text_of_the_usual_kind_is_read(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"say {number}", "chosen": "good", "rejected": "bad"}) for number in range(60_000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    assert sum(1 for _ in read_examples(SourceBlock(source=str(tmp_path / "a.jsonl.gz")))) == 60_000
    with files.open_plain(tmp_path / "a.jsonl.gz") as file:
        assert len(file.read()) == len("\n".join(rows))


def test_a_key_that_is_there_twice_in_a_file_of_a_model_is_refused(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"num_hidden_layers": 1,', 1))
    with pytest.raises(
        ModelError, match=r"config\.json: not a JSON object that can be read \(the key 'num_hidden_layers' is"
    ):
        resolve_model(str(folder))


def test_nobody_else_reads_what_others_wrote() -> None:
    library = ROOT / "platform/raylign"
    folders = [library / name for name in ("config", "prompts", "data", "models")]
    files = [*(file for folder in folders for file in folder.rglob("*.py")), *library.glob("export*.py")]
    files += [ROOT / "recipes/commands/submit.py", ROOT / "recipes/commands/cli.py"]
    found = {str(file.relative_to(ROOT)): lines for file in files if (lines := READ_HERE.findall(file.read_text()))}
    assert len(files) > 50 and found == {}, "use raylign.reading"


def test_what_a_fault_quotes_of_a_row_is_cut() -> None:
    fault = Fault(1, f"message 0 has unknown role '{'9' * 5000}'\nand more", "row", "x" * 5000)
    assert len(fault.problem) == len(fault.cure) == 400 and "\n" not in fault.problem
    assert fault.problem.startswith("message 0 has unknown role '999")


def test_what_is_said_of_a_recipe_has_a_bounded_length() -> None:
    with pytest.raises(ConfigError) as one:
        parse_config({}, ["9" * 5000 + "=1"])
    assert "unknown key; known keys: " in str(one.value) and len(str(one.value)) < 600
    with pytest.raises(ConfigError) as many:
        parse_config({f"key{number}": 1 for number in range(1000)})
    assert str(many.value).startswith("config: 1000 problem(s)\n  key0: ")
    assert str(many.value).endswith("\n  and 980 more; correct these first")
    with pytest.raises(ConfigError, match=r"^override '9+\.\.\. is not of the form"):
        parse_config({}, ["9" * 5000])
