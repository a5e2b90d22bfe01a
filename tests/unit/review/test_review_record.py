"""Pairs and answers as a run keeps them."""

import json
from pathlib import Path

import pytest

from raylign.errors import RecordError
from raylign.records import Message
from raylign.review.record import Answer, Choice, Pair, ReviewRecord, Said, conversation, pair_of, share_of_first

ABOUT = ("p1", [{"role": "user", "content": "Write."}])


def pair(texts: tuple[str, str] = ("one", "two"), seed: int = 0, identity: str = "run", prompt: str = "p1") -> Pair:
    return pair_of(identity, 1, (prompt, ABOUT[1]), texts, by="random", seed=seed)


def test_the_same_question_has_the_same_id_in_either_order() -> None:
    assert pair().id == pair(("two", "one")).id
    others = [pair(("one", "three")), pair(identity="another"), pair(prompt="p2")]
    assert len({own.id for own in (pair(), *others)}) == 4
    assert len(pair().id) == 32 and int(pair().id, 16)


def test_positions_are_drawn_with_the_seed() -> None:
    swapped = [pair((f"{i}", "x"), seed=5).swapped for i in range(400)]
    assert swapped == [pair((f"{i}", "x"), seed=5).swapped for i in range(400)]
    assert 160 < sum(swapped) < 240
    assert swapped != [pair((f"{i}", "x"), seed=6).swapped for i in range(400)]


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_among_the_shown_is_one_among_the_answers(seed: int) -> None:
    own = pair(seed=seed)
    for shown, text in zip(("A", "B"), own.shown, strict=True):
        chosen = own.choice("A" if shown == "A" else "B")
        assert {"first": own.first, "second": own.second}[chosen] == text
    assert own.choice("tie") == "tie"


def test_both_positions_come_up_above() -> None:
    assert {pair(seed=seed).swapped for seed in range(8)} == {True, False}


def test_what_is_kept_comes_back_and_nothing_twice(tmp_path: Path) -> None:
    record = ReviewRecord(tmp_path)
    first, second = pair(), pair(("half \ud800", "a\x1bb"))
    assert record.add([first, first]) == (first,)
    assert record.add([pair(("two", "one")), second]) == (first, second)
    assert ReviewRecord(tmp_path).pairs() == (first, second)
    said = Said((Answer(first.id, "ann", "tie", "same", 5),), (second.id,))
    record.keep(said)
    assert record.said() == said
    assert said.settled == {first.id, second.id}


@pytest.mark.parametrize("text", ["{", '{"pairs": 3}', '{"pairs": [{"id": "x"}]}'])
def test_a_damaged_record_is_named_with_its_cure(tmp_path: Path, text: str) -> None:
    record = ReviewRecord(tmp_path)
    record.folder.mkdir()
    (record.folder / "pairs.json").write_text(text)
    with pytest.raises(RecordError, match=r"pairs\.json cannot be read") as error:
        record.pairs()
    assert "restore it" in error.value.cure


def test_the_shuffle_is_in_the_record(tmp_path: Path) -> None:
    ReviewRecord(tmp_path).add([pair(seed=seed) for seed in range(1)])
    kept = json.loads((tmp_path / "review/pairs.json").read_text())["pairs"]
    assert [entry["swapped"] for entry in kept] == [pair().swapped]


def test_a_conversation_as_people_read_it() -> None:
    assert conversation([{"role": "user", "content": "Hi\x1b[2J"}]) == r"Hi\x1b[2J"
    turns: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"text": "Hi"}]}]
    assert conversation(turns) == 'system: Be kind.\n\nuser: [{"text": "Hi"}]'


def test_several_answers_to_a_pair() -> None:
    def share(*choices: Choice) -> float:
        return share_of_first([Answer("x", str(i), choice, "", 0) for i, choice in enumerate(choices)])

    assert [share("first"), share("second", "second"), share("tie"), share("first", "second")] == [1, 0, 0.5, 0.5]
    assert share("first", "first", "tie", "second") == 0.625
