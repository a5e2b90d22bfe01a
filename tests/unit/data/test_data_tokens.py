"""From rows to token ids, with a tokenizer of nine words: say good bad film one two three </s> <unk> are 0 to 8."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from raylign.config.data import DataBlock
from raylign.config.offline import Rows
from raylign.data.preferences import PreferenceData, load_preferences
from raylign.errors import DataError
from raylign.models import end_ids, load_tokenizer, resolve_model
from tests.unit.tiny_policy import save_policy

SAY, GOOD, BAD, FILM, ONE, TWO, THREE, EOS = range(8)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }} </s> "
    "{% elif m.role == 'system' %}three {{ m.content }} {% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}say {% endif %}"
)
TEMPLATE = TEMPLATE.replace("{{ m.content }} </s> ", "say {{ m.content }} </s> three ")
"""An answer is `say ... </s>`, and the template writes `three` behind it, which is not white space."""
CHAT = TEMPLATE.replace("</s> three ", "</s>\n")
MERGED = (
    "{% for m in messages %}{{ m.content if m.role == 'user' else ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}: {% endif %}"
)
Pair = tuple[str, str, str]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("policy")))


@pytest.fixture
def tokenizer(policy: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = CHAT
    return tokenizer


def write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(folder: Path, *rows: Pair) -> str:
    return write(folder, [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])


def load(source: str, tokenizer: PreTrainedTokenizerBase, rows: Rows = "pairs", **options: Any) -> PreferenceData:
    block = DataBlock(source=source, **{"held_out": 1, **options})
    return load_preferences(block, tokenizer, rows=rows, ends=end_ids(tokenizer, []), seed=0, refused_to=None)


def everything(data: PreferenceData) -> dict[int, Any]:
    """By row number."""
    return {int(row.prompt.id[1:]): row for row in (*data.train, *data.held_out)}


def test_a_pair_by_hand(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = load(pairs(tmp_path, ("film", "good", "bad bad"), ("one", "two", "three")), tokenizer)
    row = everything(data)[1]
    assert row.prompt.token_ids == (FILM, SAY)
    assert [c.token_ids for c in row.candidates] == [(GOOD, EOS), (BAD, BAD, EOS)]
    assert [c.text for c in row.candidates] == ["good", "bad bad"] and row.scores == (1.0, 0.0)
    assert {(c.finish_reason, c.policy_version, c.logprobs, c.prompt_id) for c in row.candidates} == {
        ("stop", 0, (), row.prompt.id)
    }
    assert row.candidates[0].index == 0 and row.candidates[1].index == 1 and row.weights == (1.0, 1.0)
    assert data.counts == {"rows": 2, "used": 2, "invalid": 0, "duplicates": 0}


def test_turns_and_the_system_message_stay(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "film")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("good", "bad")}
    rows = [
        {"prompt": prompt, "chosen": answers["good"], "rejected": answers["bad"]},
        {
            "prompt": [{"role": "system", "content": "bad"}, *prompt],
            "chosen": answers["bad"],
            "rejected": answers["good"],
        },
    ]
    found = everything(load(write(tmp_path, rows), tokenizer, system="good"))
    conversation = (ONE, SAY, TWO, EOS, FILM, SAY)
    assert found[1].prompt.token_ids == (THREE, GOOD, *conversation)
    assert found[2].prompt.token_ids == (THREE, BAD, *conversation)


def test_text_behind_the_end_stays_unless_it_is_white_space(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    row = everything(load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer))[1]
    assert row.candidates[0].token_ids == (GOOD, EOS, THREE)


def test_a_template_without_an_end_gets_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = CHAT.replace("</s>", "")
    with caplog.at_level(logging.WARNING, "raylign"):
        row = everything(load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer))[1]
    assert row.candidates[0].token_ids == (GOOD,) and row.candidates[0].finish_reason == "stop"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "in 2 rows, the first with line 1, the chat template writes no token" in warning


def test_a_token_over_the_boundary_leaves_the_prompt_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`q: ` is 0 1 2, but in `q: hi` the space and the h are one token, 5; TRL would cut the prompt to 0 1."""
    vocabulary = {"q": 0, ":": 1, " ": 2, "h": 3, "i": 4, " h": 5, "</s>": 6}
    backend = Tokenizer(models.BPE(vocabulary, [(" ", "h")]))
    backend.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=MERGED)
    assert merging("q: hi</s>", add_special_tokens=False)["input_ids"] == [0, 1, 5, 4, 6]
    with caplog.at_level(logging.WARNING, "raylign"):
        data = load(pairs(tmp_path, ("q", "i", "hi"), ("qq", "i", "hih"), ("qqq", "i", "ii")), merging)
    found = everything(data)
    assert found[1].prompt.token_ids == (0, 1, 2)
    assert [c.token_ids for c in found[1].candidates] == [(4, 6), (3, 4, 6)]
    assert found[2].prompt.token_ids == (0, 0, 1, 2)
    assert data.counts["boundary_mismatch"] == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "in 2 rows, the first with line 1, a token reaches over the end of the prompt" in warning


def test_an_answer_that_reads_otherwise_apart_is_a_bad_row(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text: `q: ` is 0 1 2 0, and `hi` alone is 5 4, with its own space."""
    backend = Tokenizer(models.BPE({"▁": 0, "q": 1, ":": 2, "h": 3, "i": 4, "▁h": 5, "</s>": 6}, [("▁", "h")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=MERGED)
    assert [spaced.encode(text) for text in ("q: ", "q: hi", "hi")] == [[0, 1, 2, 0], [0, 1, 2, 5, 4], [5, 4]]
    with pytest.raises(DataError, match="line 1: a token reaches over .* reads otherwise"):
        load(pairs(tmp_path, ("q", "i", "hi"), ("qq", "i", "hih")), spaced)


def test_a_prompt_that_an_answer_changes_is_a_bad_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As templates do that end the generation prompt with a thought, or put the system text into the last turn."""
    tokenizer.chat_template = CHAT.replace("say {% endif %}", "say three {% endif %}")
    parted = r"line 1: the chat template writes 'film say three ' in the prompt alone, but 'film say good </s>\\n' once"
    with pytest.raises(DataError, match=f"{parted}(?s:.*)model.chat_template"):
        load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "one")), tokenizer)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% if not add_generation_prompt %}" + CHAT + "{% endif %}", "no token for the prompt"),
        (CHAT.replace("{{ m.content }} </s>\n", ""), "no token for the answer"),
        (CHAT.replace("{{ m.content }} </s>", "{{ 1 + m.content }}"), r"refused by the chat template \(unsupported"),
    ],
)
def test_a_template_that_writes_no_example(
    template: str, problem: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"line 1: .*{problem}"):
        load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer)


def test_an_end_inside_an_answer_is_a_bad_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = pairs(tmp_path, ("film", "good </s> bad", "bad"), ("one", "two", "three"), ("two", "one", "three"))
    with pytest.raises(
        DataError, match="line 1: the answer holds </s>, at which generation stops, in its text: 'film'"
    ):
        load(source, tokenizer)
    assert load(source, tokenizer, max_invalid=0.4).counts["used"] == 2


def test_a_turn_may_end_with_another_token_than_eos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The model's files name `three` too, with white space behind it in the template."""
    tokenizer.chat_template = CHAT.replace("</s>", "three")
    source = pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "bad"))
    block = DataBlock(source=source, held_out=1)
    options: Any = {"rows": "pairs", "seed": 0, "refused_to": None}
    ended = load_preferences(block, tokenizer, ends=frozenset([EOS, THREE]), **options)
    assert everything(ended)[1].candidates[0].token_ids == (GOOD, THREE) and "without_end" not in ended.counts
    assert load_preferences(block, tokenizer, ends=frozenset([EOS]), **options).counts["without_end"] == 2


def test_long_answers_keep_their_start(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [("film", "good good good", "bad"), ("one one one one", "good", "bad"), ("two", "one two", "one three")]
    data = load(pairs(tmp_path, *rows), tokenizer, max_length=4)
    found = everything(data)
    assert [c.token_ids for c in found[1].candidates] == [(GOOD, GOOD), (BAD, EOS)]
    assert [c.finish_reason for c in found[1].candidates] == ["length", "stop"]
    assert [c.text for c in found[1].candidates] == ["good good", "bad"]
    assert {name: data.counts[name] for name in ("rows", "truncated", "prompt_too_long", "used")} == {
        "rows": 3,
        "truncated": 2,
        "prompt_too_long": 1,
        "used": 2,
    }
    with pytest.raises(DataError, match="none of 3 rows can be trained on\n  3 prompt too long: raise data.max_length"):
        load(pairs(tmp_path, *rows), tokenizer, max_length=2)


def test_equal_answers_and_duplicates_are_left_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [("film", "good", "bad"), ("film", "good", "bad"), ("one", "bad two", "bad three"), ("two", "one", "two")]
    data = load(pairs(tmp_path, *rows), tokenizer, max_length=3)
    assert {name: data.counts[name] for name in ("identical", "duplicates", "used")} == {
        "identical": 1,
        "duplicates": 1,
        "used": 2,
    }
    assert set(everything(data)) == {1, 4}


def test_a_prompt_is_never_in_both_parts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    words = ["good", "bad", "film", "one", "two"]
    rows = [(prompt, answer, "three") for prompt in words for answer in ("good", "bad", "one")]
    data = load(pairs(tmp_path, *rows), tokenizer, held_out=4)
    train, held_out = ({row.prompt.token_ids for row in part} for part in (data.train, data.held_out))
    assert not train & held_out and len(data.held_out) == 6 and len(data.train) == 9
    assert {row.prompt.id[0] for row in data.train} == {"t"} and {row.prompt.id[0] for row in data.held_out} == {"h"}
    assert all(c.prompt_id == row.prompt.id for row in data.held_out for c in row.candidates)
    again = load(pairs(tmp_path, *rows), tokenizer, held_out=4)
    assert again == data and load(pairs(tmp_path, *rows[:-1]), tokenizer, held_out=4).digest != data.digest
    with pytest.raises(DataError, match=r"data.held_out=13 leaves none of 15 usable rows \(5 different prompts\)"):
        load(pairs(tmp_path, *rows), tokenizer, held_out=13)


def test_demonstrations_are_the_best_answers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = everything(
        load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer, "demonstrations")
    )
    assert [[c.token_ids for c in row.candidates] for row in found.values()] in (
        [[(GOOD, EOS)], [(TWO, EOS)]],
        [[(TWO, EOS)], [(GOOD, EOS)]],
    )
    assert {row.weights for row in found.values()} == {(1.0,)}


def test_rankings_keep_all_answers_and_their_scores(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "film", "completions": ["one", "two", "three"], "scores": [0.5, 2.0, 1.0]},
        {"prompt": "one", "completions": ["two", "three", "good"]},
    ]
    source = write(tmp_path, rows)
    found = everything(load(source, tokenizer, "rankings"))
    assert [c.text for c in found[1].candidates] == ["two", "three", "one"] and found[1].scores == (2.0, 1.0, 0.5)
    assert found[2].scores == (2.0, 1.0, 0.0)
    ends = everything(load(source, tokenizer, "pairs"))
    assert [c.text for c in ends[1].candidates] == ["two", "one"] and ends[1].scores == (2.0, 0.5)


def test_an_answer_that_repeats_a_better_one_is_left_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "film", "completions": ["one", "two two", "two three", "three"], "scores": [1.0, 5.0, 4.0, 2.0]},
        {"prompt": "one", "completions": ["two", "three", "good"]},
    ]
    data = load(write(tmp_path, rows), tokenizer, "rankings", max_length=3)
    row = everything(data)[1]
    assert [c.token_ids for c in row.candidates] == [(TWO,), (THREE,), (ONE,)]
    assert [c.index for c in row.candidates] == [0, 1, 2] and row.scores == (5.0, 2.0, 1.0)
    assert data.counts["repeated"] == 1 and row.prompt.meta["margin"] == 4.0


def test_labels_of_a_row_stay(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"prompt": word, "chosen": "good", "rejected": "bad", "origin": "web", "lang": "en"} for word in ("film", "one")
    ]
    found = everything(load(write(tmp_path, rows), tokenizer))
    assert found[1].prompt.meta["origin"] == "web" and found[1].prompt.meta["language"] == "en"
    assert "margin" not in found[1].prompt.meta


def test_the_first_rows_are_taken(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [(word, "good", "bad") for word in ("film", "one", "two", "three")]
    data = load(pairs(tmp_path, *rows), tokenizer, limit=3)
    assert set(everything(data)) == {1, 2, 3} and data.counts["rows"] == 3


TOOL = {"type": "function", "function": {"name": "one", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "one", "arguments": {}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}three {{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}say {{ m.content or '' }} "
    "{% for c in m.tool_calls or [] %}bad {{ c.function.name }} {% endfor %}</s>\n"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}say {% endif %}"
)


def tool_row(prompt: str) -> dict[str, Any]:
    turns = [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "good"},
    ]
    rejected = [{"role": "assistant", "content": "film"}]
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": turns, "rejected": rejected, "tools": [TOOL]}


def test_tools_are_in_the_prompt_and_calls_in_the_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = WITH_TOOLS
    row = everything(load(write(tmp_path, [tool_row("film"), tool_row("good")]), tokenizer))[1]
    assert row.prompt.token_ids == (THREE, ONE, FILM, SAY)
    assert row.candidates[0].token_ids == (BAD, ONE, EOS, TWO, SAY, GOOD, EOS)
    assert row.candidates[0].text == "bad one two say good" and row.candidates[1].text == "film"


@pytest.mark.parametrize(
    ("dropped", "problem"),
    [
        ("{% for t in tools or [] %}three {{ t.function.name }} {% endfor %}", "leaves out the tool one"),
        ("bad {{ c.function.name }} ", "leaves out the call of one"),
    ],
)
def test_a_template_that_leaves_tools_out(
    dropped: str, problem: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = WITH_TOOLS.replace(dropped, "")
    row = tool_row("film")
    if "call" in problem:
        row["tools"] = []
    with pytest.raises(DataError, match=f"line 1: the chat template {problem}"):
        load(write(tmp_path, [row, tool_row("good")]), tokenizer)


def test_ties_are_no_pairs(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tie: dict[str, Any] = {
        "prompt": "film",
        "chosen": "good",
        "rejected": "bad",
        "score_chosen": 3,
        "score_rejected": 3,
    }
    others = [{"prompt": word, "chosen": "good", "rejected": "bad"} for word in ("one", "two")]
    assert load(write(tmp_path, [tie, *others]), tokenizer).counts["ties"] == 1


def test_rated_answers_need_preparing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ratings = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 2)
    rows = [{"prompt": "film", "response": answer, **ratings} for answer in ("good", "bad")]
    with pytest.raises(DataError, match="answers with ratings, but in no order.*(?s:.)*raylign data prepare"):
        load(write(tmp_path, rows), tokenizer)


def test_bad_rows_are_named_and_may_be_left_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "film", "chosen": "good", "rejected": "bad"}, {"prompt": "one", "chosen": "two"}]
    more = [{"prompt": word, "chosen": "good", "rejected": "bad"} for word in ("two", "three")]
    source = write(tmp_path, [*rows, *more])
    with pytest.raises(DataError, match="line 2: .*(?s:.)*or leave them out: data.max_invalid=0.25"):
        load(source, tokenizer)
    assert load(source, tokenizer, max_invalid=0.25).counts["invalid"] == 1


def test_a_conversation_the_template_refuses_is_a_bad_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% if messages[0].content == 'film' %}{{ raise_exception('no film') }}{% endif %}" + CHAT
    with pytest.raises(DataError, match=r"refused by the chat template \(no film\)"):
        load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def trl_pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL's DPOTrainer makes of conversational rows."""
    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    made: Any = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(rows), tokenizer, args, "train")  # type: ignore[arg-type]
    return list(made)


def trl_demonstrations(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL's SFTTrainer makes of conversational rows."""
    trainer: Any = SimpleNamespace(chat_template=None, completion_only_loss=True)
    args: Any = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=None,
        shuffle_dataset=False,
    )
    made: Any = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train")
    return list(made)


def test_smollm2_is_tokenised_as_trl_does_up_to_the_newline_behind_the_end(tmp_path: Path) -> None:
    """TRL trains on that newline too, which no generation reaches. All else is equal."""
    smollm2 = load_tokenizer(resolve_model("embedded:smollm2-135m"))
    prompts = [
        [message("user", "Is it good?")],
        [
            {"role": "system", "content": "Be brief."},
            message("user", "你好吗"),
            message("assistant", "很好"),
            message("user", "Why?  "),
        ],
    ]
    answers = [("Yes, very.\n\n- it is", " No idea"), ("因为", "不知道 👍")]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]
    newline = smollm2.encode("\n")
    found = everything(load(write(tmp_path, rows), smollm2))
    for number, trl in enumerate(trl_pairs(smollm2, rows), start=1):
        row = found[number]
        assert list(row.prompt.token_ids) == trl["prompt_ids"]
        for candidate, name in zip(row.candidates, ("chosen_ids", "rejected_ids"), strict=True):
            assert [*candidate.token_ids, *newline] == trl[name]
            assert candidate.token_ids[-1] == smollm2.eos_token_id
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    best = everything(load(write(tmp_path, demonstrations), smollm2, "demonstrations"))
    for number, trl in enumerate(trl_demonstrations(smollm2, demonstrations), start=1):
        (candidate,) = best[number].candidates
        assert [*best[number].prompt.token_ids, *candidate.token_ids, *newline] == trl["input_ids"]
        assert [label for label in trl["labels"] if label != -100] == [*candidate.token_ids, *newline]
