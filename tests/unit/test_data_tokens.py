"""From rows to token ids, with a tokenizer of nine words: say good bad film one two three </s> <unk> are 0 to 8."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import common_prefix_length  # type: ignore[attr-defined]

from raylign.config.data import DataBlock
from raylign.config.offline import Rows
from raylign.data.preferences import PreferenceData, load_preferences
from raylign.errors import DataError, ModelError
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
Pair = tuple[str, str, str]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(save_policy(tmp_path / "policy")))
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
    assert dict(data.counts) == {"rows": 2, "used": 2} | {"invalid": 0, "duplicates": 0, "truncated": 0}


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


def test_a_template_without_an_end_gets_none(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT.replace("</s>", "")
    row = everything(load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer))[1]
    assert row.candidates[0].token_ids == (GOOD,)


def test_the_completion_starts_where_the_tokens_part(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt alone ends in `say three`, the conversation goes on behind `say`: one token is no part of it."""
    tokenizer.chat_template = CHAT.replace("say {% endif %}", "say three {% endif %}")
    with caplog.at_level(logging.WARNING, "raylign"):
        data = load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer)
    row = everything(data)[1]
    assert row.prompt.token_ids == (FILM, SAY) and row.candidates[0].token_ids == (GOOD, EOS)
    # `three` of row 2 begins as its prompt alone ends, but the other answer does not.
    assert everything(data)[2].prompt.token_ids == (ONE, SAY)
    assert data.counts["boundary_mismatch"] == 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("row 1: the last 1 tokens of the templated prompt")


def test_long_answers_keep_their_start(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [("film", "good good good", "bad"), ("one one one one", "good", "bad"), ("two", "one two", "one three")]
    data = load(pairs(tmp_path, *rows), tokenizer, max_length=4)
    found = everything(data)
    assert [c.token_ids for c in found[1].candidates] == [(GOOD, GOOD), (BAD, EOS)]
    assert [c.finish_reason for c in found[1].candidates] == ["length", "stop"]
    assert {name: data.counts[name] for name in ("rows", "truncated", "prompt_too_long", "used")} == {
        "rows": 3,
        "truncated": 2,
        "prompt_too_long": 1,
        "used": 2,
    }
    with pytest.raises(DataError, match="raise data.max_length"):
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
    with pytest.raises(DataError, match="data.held_out=15 leaves none of 15 usable rows"):
        load(pairs(tmp_path, *rows), tokenizer, held_out=15)


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


def test_smollm2_is_tokenised_as_trl_does_up_to_the_newline_behind_the_end(tmp_path: Path) -> None:
    smollm2 = load_tokenizer(resolve_model("embedded:smollm2-135m"))
    rows = [("Is it good?", "Yes, very.", "No idea"), ("你好吗", "很好", "不好")]
    for number, (prompt, *answers) in enumerate(rows, start=1):
        row = everything(load(pairs(tmp_path, *rows), smollm2))[number]
        turns = [{"role": "user", "content": prompt}]
        templated: Any = partial(smollm2.apply_chat_template, return_dict=False)
        whole = [templated([*turns, {"role": "assistant", "content": text}]) for text in answers]
        alone = templated(turns, add_generation_prompt=True)
        start = min(common_prefix_length(alone, ids) for ids in whole)
        assert list(row.prompt.token_ids) == alone[:start] == alone
        for candidate, ids in zip(row.candidates, whole, strict=True):
            assert [*candidate.token_ids, *smollm2.encode("\n")] == ids[start:]
            assert candidate.token_ids[-1] == smollm2.eos_token_id


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{% for", "not a chat template"),
        ("{{ 'always the same' }}", "does not write the user's message"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing for add_generation_prompt"),
        (None, "cannot be read"),
    ],
)
def test_a_template_of_ones_own_is_checked(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError, match=problem):
        load_tokenizer(str(save_policy(tmp_path / "policy")), chat_template=path)


def test_a_template_of_ones_own_takes_the_models_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHAT)
    tokenizer = load_tokenizer(str(save_policy(tmp_path / "policy")), chat_template=path)
    row = everything(load(pairs(tmp_path, ("film", "good", "bad"), ("one", "two", "three")), tokenizer))[1]
    assert row.candidates[0].token_ids == (GOOD, EOS)
