"""Each format that raylign reads: inputs to try, and the reader that a command would use."""

import gzip
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raylign.config import load_recipe
from raylign.config.blocks import PromptsBlock
from raylign.config.data import DataBlock
from raylign.data.preferences import load_preferences
from raylign.data.rows import read_examples
from raylign.evaluation.capability.likelihood import Encoder, encode
from raylign.evaluation.capability.tasks import load_task
from raylign.models import context_limit, end_ids, load_tokenizer, resolve_model
from raylign.models.open import embedding_rows, read_chat_template
from raylign.prompts import load_prompts
from raylign.prompts.tables import Fault
from tests.fuzz import functions, journal, records, servers
from tests.fuzz.guard import folder_until_exit
from tests.fuzz.mutations import as_json, changed, edited, values

ROOT = Path(__file__).resolve().parents[2]
SEED = 0


@dataclass(frozen=True, slots=True)
class Format:
    """`reader` gets one input of `inputs` as bytes; it takes what `valid` gives.

    `cost` is how much longer than usual it takes; there are so many fewer inputs in a turn.
    """

    inputs: Callable[[], st.SearchStrategy[bytes]]
    reader: Callable[[bytes], object]
    valid: Callable[[], bytes]
    cost: int = 1


@cache
def folder() -> Path:
    """For the files of this process."""
    return folder_until_exit()


def written(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model("embedded:smollm2-135m"))


RECIPES = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
RECIPE_WORDS = (b"recipe: ", b"trainer: {", b"run: {seed: ", b"loss: {loss_type: ", b"scoring: {type: ", b"  lora: ")


def recipe(data: bytes) -> None:
    load_recipe(written("recipe.yaml", data))


def override(data: bytes) -> None:
    load_recipe(ROOT / "recipes/sentiment_smollm2.yaml", [data.decode("utf-8", "surrogateescape")])


OVERRIDES = [b"trainer.learning_rate=1e-5", b"run.seed=3", b"loss={loss_type: ipo}", b"model.lora={r: 4}"]

CHAT = [{"role": "user", "content": "What is a ray?"}, {"role": "assistant", "content": "A line."}]
PROMPT_ROWS: list[dict[str, Any]] = [
    {"prompt": "What is a ray?", "answer": "a line"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    {"prompt": "Name a fish.", "extra": {"a": [1, 2]}},
    {"instruction": "Name a fish.", "output": "A trout.", "generator": "g", "dataset": "d"},
    {"question_id": "q", "cluster": "c", "turns": [{"content": "Name a fish."}]},
    {"uid": "q", "ans_id": "a", "messages": [*CHAT[:1], {"role": "assistant", "content": {"answer": "A line."}}]},
    {"question_id": "q", "answer_id": "a", "choices": [{"index": 0, "turns": [{"content": "A trout."}]}]},
    {"key": 1, "prompt": "Why?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]},
]
DATA_ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fish.", "chosen": "A trout.", "rejected": "A stone."},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "No."}]},
    {"chosen": CHAT, "rejected": [*CHAT[:1], {"role": "assistant", "content": "No."}], "score_chosen": 3},
    {"prompt": "Name a fish.", "completions": ["A trout.", "A stone."], "scores": [1.0, 0.0]},
    {"instruction": "Name a fish.", "input": "", "chosen": "A trout.", "rejected": "A stone."},
    {
        "conversations": [{"from": "human", "value": "Name a fish."}],
        "chosen": {"from": "gpt", "value": "A trout."},
        "rejected": {"from": "gpt", "value": "A stone."},
    },
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {
        "prompt": "Why?",
        "response_1": "So.",
        "response_2": "No.",
        "preference_strength": 2,
        "preference_statement": "x",
    },
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
]


CAPABILITY_ROWS: list[dict[str, Any]] = [
    {"question": "What is a ray?", "choices": ["a line", "a fish"], "answer": 0},
    {"text": "A ray is a line. A ray is a fish."},
]


def variants(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Four rows of the same form with other words."""
    text = json.dumps(row)
    return [json.loads(re.sub(r"([a-z])([.?])", rf"\1 {number}\2", text)) for number in range(4)]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def json_lines(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    mixed = [variant for row in rows for variant in variants(row)]
    tree = st.lists(changed(mixed), min_size=1, max_size=4).map(lambda found: b"\n".join(map(as_json, found)))
    raw = edited([lines_of(variants(row)) for row in rows], [b'"prompt"', b'"chosen"', b'"role"', b'"content"'])
    return st.one_of(tree, raw)


def json_array(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    tree = st.lists(changed(rows), min_size=1, max_size=4).map(as_json)
    raw = edited([as_json(variants(row)) for row in rows] + [as_json({"train": rows})])
    return st.one_of(tree, raw)


def zipped(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    whole = inner.map(lambda data: gzip.compress(data, compresslevel=1))
    return st.one_of(whole, edited([gzip.compress(lines_of(variants(DATA_ROWS[0])), compresslevel=1)]))


def _parquet(rows: list[dict[str, Any]]) -> bytes | None:
    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return buffer.getvalue()


def _bomb(drawn: tuple[str, int]) -> bytes:
    """One text that stands in thousands of rows, and once in the file."""
    column, size = drawn
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: pa.DictionaryArray.from_arrays(pa.array([0] * 4000), ["z" * size])}), buffer)
    return buffer.getvalue()


def parquet(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    cells = st.lists(changed(rows).filter(lambda row: isinstance(row, dict)), min_size=1, max_size=3)
    made = cells.map(_parquet).filter(lambda data: data is not None).map(lambda data: data or b"")
    bombs = st.tuples(st.sampled_from(sorted(rows[0])), st.sampled_from((1 << 18, 1 << 20))).map(_bomb)
    columns = st.dictionaries(st.sampled_from(("prompt", "chosen", "rejected", "score")), values(), min_size=1)
    odd = columns.map(lambda row: _parquet([row]) or b"")
    whole = [data for row in rows if (data := _parquet(variants(row)))]
    return st.one_of(made, odd, bombs, edited(whole))


def prompts_as(suffix: str) -> Callable[[bytes], None]:
    def reader(data: bytes) -> None:
        block = PromptsBlock(source=str(written(f"prompts{suffix}", data)), held_out=1)
        load_prompts(block, tokenizer(), 64, SEED)

    return reader


def data_as(suffix: str) -> Callable[[bytes], None]:
    def reader(data: bytes) -> None:
        block = DataBlock(source=str(written(f"data{suffix}", data)), held_out=1, max_length=64)
        for example in read_examples(block):
            if isinstance(example, Fault):
                str(example.problem + example.cure)
        load_preferences(block, tokenizer(), rows="pairs", ends=frozenset({2}), seed=SEED, refused_to=None)

    return reader


def capability_as(suffix: str) -> Callable[[bytes], None]:
    def reader(data: bytes) -> None:
        encode(load_task(str(written(f"capability{suffix}", data))), Encoder(tokenizer(), 64, "data.max_length"))

    return reader


TEMPLATES = [
    b"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    b"{% if add_generation_prompt %}assistant: {% endif %}",
    b"{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    b"{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
]
TEMPLATE_WORDS = (
    b"{{ ",
    b" }}",
    b"{% if ",
    b"{% endif %}",
    b"{% endfor %}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    b"{{ 'a' * 10**9 }}",
    b"{{ 9**9**9 }}",
    b"{% include 'x' %}",
    b"{{ raise_exception('no') }}",
    b"{{ messages | tojson }}",
    b"{{ strftime_now('%s') }}",
    b"{{ cycler.__init__.__globals__ }}",
    b"{% set x = namespace(y=1) %}",
    b"{% for i in range(99999999) %}{% endfor %}",
    b"{% for i in range(9999) %}{% for i in range(9999) %}{% endfor %}{% endfor %}",
    b"{% set x = namespace(y='aaaa') %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
    b"{{ 9 ** (9 ** 9) }}",
)


def chat_template(data: bytes) -> None:
    read_chat_template(written("template.jinja", data))


MODEL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


@cache
def model_seeds() -> Mapping[str, bytes]:
    source = Path(resolve_model("embedded:smollm2-135m"))
    return {name: (source / name).read_bytes() for name in (*MODEL_FILES, "chat_template.jinja")}


def model_file(name: str) -> Format:
    def inputs() -> st.SearchStrategy[bytes]:
        seeds = [model_seeds()[name]]
        # A tokenizer's vocabulary is a tree of 100,000 nodes, which edits reach as well.
        trees = [] if name == "tokenizer.json" else [changed([json.loads(seed) for seed in seeds]).map(as_json)]
        return st.one_of(edited(seeds, [b'"model_type"', b'"vocab_size"', b'"eos_token_id"', b'"auto_map"']), *trees)

    def reader(data: bytes) -> None:
        place = folder() / "model"
        place.mkdir(exist_ok=True)
        for other, content in model_seeds().items():
            (place / other).write_bytes(data if other == name else content)
        if name.startswith("tokenizer"):
            load_tokenizer(str(place))
            return
        end_ids(tokenizer(), [place])
        if name == "config.json":
            embedding_rows(str(place))
            context_limit(str(place))

    return Format(inputs, reader, lambda: model_seeds()[name], cost=10 if name.startswith("tokenizer") else 1)


def text_rows(
    suffix: str,
    inputs: Callable[[list[dict[str, Any]]], st.SearchStrategy[bytes]],
    write: Callable[[list[dict[str, Any]]], bytes],
) -> dict[str, Format]:
    """Prompts, judged text and tasks of capability in files of this kind."""

    def made(rows: list[dict[str, Any]], reader: Callable[[bytes], None]) -> Format:
        return Format(lambda: inputs(rows), reader, lambda: write(variants(rows[0])))

    return {
        f"prompts{suffix}": made(PROMPT_ROWS, prompts_as(suffix)),
        f"data{suffix}": made(DATA_ROWS, data_as(suffix)),
        f"capability{suffix}": made(CAPABILITY_ROWS, capability_as(suffix)),
    }


def packed() -> Format:
    def inputs() -> st.SearchStrategy[bytes]:
        return zipped(json_lines(DATA_ROWS))

    return Format(inputs, data_as(".jsonl.gz"), lambda: gzip.compress(lines_of(variants(DATA_ROWS[0]))))


def traced(table: str) -> Format:
    """A table of a run whose rows become traces."""
    valid = records.valid(f"rounds/0001/{table}")
    return Format(lambda: parquet(records.rows(table)), records.traces(table, folder), valid, cost=2)


def answered(body: bytes, reader: Callable[[bytes], None], cost: int = 1) -> Format:
    found = servers.answers(body)
    changes = changed([json.loads(body)]).map(lambda tree: servers.answers(as_json(tree))[0])
    return Format(lambda: st.one_of(changes, edited(found, servers.WORDS)), reader, lambda: found[0], cost)


def reasoned() -> Format:
    """A judge's reason and choice, which is JSON within JSON."""
    outer = answered(servers.saying(as_json(servers.REASONED)), servers.reasoning_judge)
    inner = changed([servers.REASONED]).map(lambda tree: servers.answers(servers.saying(as_json(tree)))[0])
    return Format(lambda: st.one_of(inner, outer.inputs()), outer.reader, outer.valid)


FORMATS: Mapping[str, Format] = {
    "recipe": Format(lambda: edited(RECIPES, RECIPE_WORDS), recipe, lambda: RECIPES[-1]),
    "override": Format(lambda: edited(OVERRIDES, RECIPE_WORDS), override, lambda: OVERRIDES[0]),
    **text_rows(".jsonl", json_lines, lines_of),
    **text_rows(".json", json_array, as_json),
    **text_rows(".parquet", parquet, lambda rows: _parquet(rows) or b""),
    "data.jsonl.gz": packed(),
    "chat-template": Format(lambda: edited(TEMPLATES, TEMPLATE_WORDS), chat_template, lambda: TEMPLATES[0], cost=10),
    **{f"model-{name}": model_file(name) for name in MODEL_FILES},
    **{
        f"run-{name}": Format(records.inputs(name), records.reader(name, folder), records.valid(name), cost=2)
        for name in records.FILES
    },
    **{f"traced-{table}": traced(table) for table in ("samples.parquet", "preferences.parquet")},
    "run-mlflow.json": Format(
        lambda: edited([records.MLFLOW_STATE]), records.mlflow_state(folder), lambda: records.MLFLOW_STATE
    ),
    "run-scores.sqlite": Format(lambda: edited([records.kept_scores()]), records.scores(folder), records.kept_scores),
    "run-scores-table": Format(records.tables, records.scores(folder), records.kept_scores),
    "run-trainer-state": Format(
        lambda: st.one_of(edited([records.TRAINER]), changed([json.loads(records.TRAINER)]).map(as_json)),
        records.trainer(folder),
        lambda: records.TRAINER,
    ),
    "run-journal-to-mlflow": Format(journal.inputs, journal.reader(folder), lambda: journal.written(journal.events())),
    "function-source": Format(
        lambda: edited(functions.SOURCES, functions.SOURCE_WORDS),
        functions.source(folder),
        lambda: functions.SOURCES[0],
    ),
    "function-name": Format(
        lambda: edited(functions.SPECS, functions.SPEC_WORDS), functions.spec, lambda: functions.SPECS[0], cost=5
    ),
    "function-answers": Format(
        functions.frames, functions.channel, lambda: functions.framed(as_json(functions.ANSWERS[0]))
    ),
    "text-with-secrets": Format(functions.texts, functions.secrets, lambda: functions.TEXTS[0]),
    "server-raylign": answered(servers.SCORES, servers.service("raylign")),
    "server-openrlhf": answered(b'{"rewards": [0.5]}', servers.service("openrlhf")),
    "server-judge": answered(servers.VERDICT, servers.judge),
    "server-judge-reasons": reasoned(),
    "server-mlflow": answered(servers.MLFLOW, servers.mlflow, cost=5),
}
