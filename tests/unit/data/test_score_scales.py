"""Scores that do not compare: found in the rows of a source, and told where a loss reads how far they are apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from raylign.config import OfflineDpoConfig, RewardModelConfig, SftConfig
from raylign.data.examples import scale_of
from raylign.data.preferences import mixed_scales
from raylign.data.prepare import PAIRS_NAME
from tests.unit.data.test_data_tokens import everything, load, policy, tokenizer, write
from tests.unit.data.test_prepare_pipeline import run, save

__all__ = ["policy", "tokenizer"]
DATA = {"data": {"source": "x.jsonl"}}
PAIR = {"chosen": "good", "rejected": "bad"}
MIXED: list[dict[str, Any]] = [
    {"prompt": "film", **PAIR, "score_chosen": 9, "score_rejected": 2},
    {"prompt": "one", **PAIR, "score_chosen": 7, "score_rejected": 6},
    {"prompt": "two", **PAIR, "margin": 2},
    {"prompt": "three", **PAIR},
    {"prompt": "film film", **PAIR, "score_chosen": 0.9, "score_rejected": 0.2, "score_scale": "ratings in 0..1"},
]


def test_rows_say_what_their_scores_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = everything(load(write(tmp_path, MIXED), tokenizer))
    expected = ["scores", "scores", "strengths", "order alone", "ratings in 0..1"]
    assert [scale_of(found[number]) for number in sorted(found)] == expected


def test_counts_are_told_to_losses_that_read_gaps(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = load(write(tmp_path, MIXED), tokenizer)
    note = mixed_scales(data, ("soft_label_scale=1",))
    assert "loss.soft_label_scale=1 reads how far scores are apart as if on one scale, and they are on 4: " in note
    assert "2 rows have scores, 1 rows have " in note and "1 rows have order alone (their scores are places)" in note
    assert mixed_scales(data, ()) == ""
    assert mixed_scales(load(write(tmp_path, MIXED[:2]), tokenizer), ("loss_type=odpo",)) == ""


def test_a_prepared_mix_says_what_its_scores_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Ratings on 0..1 compare between sources, two sources' own scores do not."""
    words = ("film", "one", "two", "three")

    def rows(first: str, **scores: Any) -> list[dict[str, Any]]:
        return [{"prompt": f"{first} {word}", "chosen": "good good", "rejected": "bad one", **scores} for word in words]

    def rated(first: str) -> list[dict[str, Any]]:
        answers = [
            {"response": text, "annotations": {"helpfulness": {"Rating": mark}}}
            for text, mark in (("good film", 5), ("bad film", 2))
        ]
        return [{"instruction": f"{first} {word}", "completions": answers} for word in words]

    sources = {
        "a": rows("film", score_chosen=9, score_rejected=2),
        "b": rows("one", score_chosen=0.3, score_rejected=-1.5),
        "c": rated("two"),
        "d": rated("three"),
        "e": rows("good"),
    }
    files = [save(tmp_path / f"{name}.jsonl", found) for name, found in sources.items()]
    run(tmp_path, *files, filters={"min_chars": 1, "near_duplicates": None})
    data = load(str(tmp_path / "out" / PAIRS_NAME), tokenizer)
    note = mixed_scales(data, ("margin=scores",))
    assert "they are on 4: 8 rows have ratings in 0..1, " in note
    for part in (f"4 rows have scores of {files[0]}", f"4 rows have scores of {files[1]}", "4 rows have order alone"):
        assert part in note


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("{loss_type: sigmoid}", ()),
        ("{loss_type: sigmoid_norm, soft_label_scale: 0.5}", ("soft_label_scale=0.5",)),
        ("{loss_type: odpo}", ("loss_type=odpo",)),
        ("{loss_type: list_net}", ("loss_type=list_net",)),
        ("{loss_type: lambda}", ()),
        ("{loss_type: kto}", ()),
        ("{loss_type: kto, desirable_above: 3}", ("desirable_above=3",)),
        (
            "{loss_type: mix, losses: [{loss_type: probit, soft_label_scale: 2}, {loss_type: odpo}, {loss_type: sft}]}",
            ("soft_label_scale=2", "loss_type=odpo"),
        ),
    ],
)
def test_losses_say_what_they_read(loss: str, options: tuple[str, ...]) -> None:
    config = OfflineDpoConfig.model_validate(DATA | {"loss": yaml.safe_load(loss)})
    assert config.score_options == options


def test_reward_models_and_demonstrations_say_what_they_read() -> None:
    plain, margin, ranking = (
        RewardModelConfig.model_validate(DATA | {"loss": loss})
        for loss in (
            {"loss_type": "bradley_terry"},
            {"loss_type": "probit", "margin": "scores"},
            {"loss_type": "plackett_luce"},
        )
    )
    assert (plain.score_options, margin.score_options, ranking.score_options) == ((), ("margin=scores",), ())
    assert SftConfig.model_validate(DATA).score_options == ()


def test_the_file_of_the_audit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rated 1 to 10, a strength and unrated, in one file: their gaps were 7, 2 and 1 and read as such."""
    rows = [MIXED[0], MIXED[2], MIXED[3]]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(str(tmp_path / "three.jsonl"), tokenizer)
    gaps = sorted(row.scores[0] - row.scores[-1] for row in (*data.train, *data.held_out))
    assert gaps == [1.0, 2.0, 7.0] and "they are on 3" in mixed_scales(data, ("margin=scores",))
