"""Sources in, a folder with clean pairs and a report out."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from trl.data_utils import is_conversational
from typer.testing import CliRunner

from raylign.config.data import SourceBlock
from raylign.config.load import parse_tree
from raylign.config.prepare import PrepareConfig
from raylign.data.examples import Example
from raylign.data.prepare import PAIRS_NAME, Report, collect, prepare, table
from raylign.data.rows import read_examples
from raylign.errors import ConfigError, DataError
from raylign.run.fingerprints import fingerprint
from recipes.commands.cli import app

ROOT = Path(__file__).parents[3]
PLAIN = {"type": "none"}
TOPICS = ("rain", "snow", "the sea", "old maps", "bread", "a lamp", "wolves", "glass", "the moon", "tea")


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def english(number: int) -> dict[str, Any]:
    topic = f"{TOPICS[number % 10]} in the year {number} of that king"
    chosen = f"This is what {topic} did to {number + 7} towns that you know from {TOPICS[number // 10 % 10]}."
    return pair(f"What do you know of {topic}?", chosen, f"Nothing that I could tell of {topic}.")


def chinese(number: int) -> dict[str, Any]:
    part = "".join(chr(0x4E00 + (number * 97 + step * 31) % 5000) for step in range(20))
    return pair(f"请介绍一下{part}的历史", f"它的历史是这样的：{part[::-1]}，非常悠久。", f"我不太清楚{part}的情况。")


def rated(prompt: str, *answers: tuple[str, int]) -> dict[str, Any]:
    completions = [{"response": text, "annotations": {"helpfulness": {"Rating": mark}}} for text, mark in answers]
    return {"instruction": prompt, "completions": completions}


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder: Path, *sources: str, output: str = "out", **options: Any) -> Report:
    named = [source if isinstance(source, dict) else {"source": source} for source in sources]
    raw = {"sources": named, "output": str(folder / output), "mix": PLAIN, **options}
    return prepare(parse_tree(raw, PrepareConfig, "config"), Console(quiet=True))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / PAIRS_NAME).to_pylist()
    return rows


def counted(counts: Any) -> dict[str, int]:
    """The fates that something had."""
    return {fate: count for fate, count in counts.items() if count}


def messy(folder: Path) -> tuple[str, str]:
    """One row or pair of every fate, and one or more that stay."""
    same = pair("Which city is it?", "It is surely Paris.", " It is surely Paris.\n")
    words = " ".join(f"word{number}" for number in range(60))
    pairs = [
        *map(english, range(3)),
        same,
        pair("Which city is it?", "Paris", "It may be Lyon or Nice."),
        pair("Which city is it?", "It is Paris. " * 50, "It may be Lyon or Nice."),
        pair("Which city is it?", "As an AI language model I cannot say.", "It may be Lyon or Nice."),
        english(1),
        pair("What are the words that you have?", words, "There are none of them."),
        pair("What are the words that you have?", f"{words} more", "There are others beside."),
        {"prompt": "Alone?", "completion": "A demonstration that stays out."},
        {"prompt": "Equal?", "completions": ["The one answer", "The other answer"], "scores": [2, 2]},
        {"prompt": "Bad?", "chosen": 7, "rejected": "An answer of words"},
    ]
    ratings = [
        rated("What is best of these?", ("The best of them all", 5), ("The worst of them all", 1), ("In between", 3)),
        rated("What is close to this?", ("As good as the other", 3), ("As good as the first", 3)),
    ]
    return save(folder / "pairs.jsonl", pairs), save(folder / "ratings.jsonl", ratings)


def test_every_row_and_every_pair_is_counted_once(tmp_path: Path) -> None:
    report = run(tmp_path, *messy(tmp_path), filters={"max_chars": 500}, max_invalid=0.1)
    assert counted(report.rows) == {"bad": 1, "single_answer": 1, "small_gap": 1, "tie": 1, "paired": 11}
    assert counted(report.pairs) == {
        "same_answer": 1,
        "short": 1,
        "long": 1,
        "template": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
        "kept": 5,
    }
    assert [counted(source.pairs)["kept"] for source in report.sources] == [4, 1]
    assert sum(report.rows.values()) == 15 and sum(report.pairs.values()) == report.rows["paired"]
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["0-1-0", "0-2-0", "0-3-0", "0-9-0", "1-1-0"]


def test_the_first_reason_that_holds_is_the_one_that_counts(tmp_path: Path) -> None:
    # Short, templated and repeated at once.
    rows = [english(0), *[pair("Who are you?", "I am an AI", "I'm an AI")] * 2]
    assert counted(run(tmp_path, save(tmp_path / "a.jsonl", rows)).pairs) == {"short": 2, "kept": 1}


def test_all_pairs_of_a_rated_row_share_their_prompt_and_stay(tmp_path: Path) -> None:
    row = rated("What is best of these?", ("The best of all", 5), ("The middle of it", 3), ("The worst of all", 1))
    report = run(tmp_path, save(tmp_path / "a.jsonl", [row]), ratings={"pairs": "all_pairs"})
    found = [(row["score_chosen"], row["score_rejected"]) for row in rows_of(tmp_path / "out")]
    assert found == [(1.0, 0.5), (1.0, 0.0), (0.5, 0.0)]
    assert report.sources[0].gaps["50 %"] == 0.5 and report.sources[0].gaps["max"] == 1.0


def test_the_mix_has_exact_shares_and_says_what_was_short(tmp_path: Path) -> None:
    rows = [
        *map(english, range(30)),
        *map(chinese, range(9)),
        pair("Où est Paris ?", "En France, bien sûr.", "Je ne sais pas du tout."),
    ]
    report = run(tmp_path, save(tmp_path / "a.jsonl", rows), mix={"type": "language", "size": 100})
    assert report.languages == {"en": 21, "zh": 9}
    assert counted(report.pairs) == {"other_language": 1, "not_drawn": 9, "kept": 30}
    assert "mix.size=100 cannot be met: language zh has 9 pairs, a share of 0.3 needs 30" in report.notes[0]


def test_the_sources_language_is_believed(tmp_path: Path) -> None:
    source: Any = {"source": save(tmp_path / "a.jsonl", [english(0)]), "language": "zh"}
    assert run(tmp_path, source).languages == {"zh": 1}


def test_weights_of_sources(tmp_path: Path) -> None:
    first = save(tmp_path / "a.jsonl", list(map(english, range(20))))
    second = save(tmp_path / "b.jsonl", list(map(chinese, range(20))))
    weighted: list[Any] = [{"source": first, "weight": 3}, {"source": second}]
    report = run(tmp_path, *weighted, mix={"type": "source", "size": 12})
    assert [source.pairs["kept"] for source in report.sources] == [9, 3]


def test_a_seed_gives_one_file_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a.jsonl", [*map(english, range(60)), *map(chinese, range(30)), english(3)])
    mix = {"type": "language", "size": 40}
    monkeypatch.setattr(table, "ROW_GROUP", 16)
    hashes = {run(tmp_path, source, mix=mix, output="first").sha256}
    for batch in (1, 7):
        monkeypatch.setattr(collect, "BATCH", batch)
        hashes.add(run(tmp_path, source, mix=mix, output=f"batch-{batch}").sha256)
    assert len(hashes) == 1
    assert pq.read_metadata(tmp_path / "first" / PAIRS_NAME).num_row_groups == 3
    assert run(tmp_path, source, mix=mix, seed=1, output="other").sha256 not in hashes


def test_the_file_is_read_back_by_us_by_datasets_and_by_trl(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": {"town": "Köln"}}}
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain in Köln today?"}]
    chosen = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    ]
    chosen.append({"role": "assistant", "content": "No, it stays dry."})
    rejected = [{"role": "assistant", "content": "How should I know that?"}]
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
    first = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "tools": tools,
        "score_chosen": 9,
        "score_rejected": 2,
    }
    run(tmp_path, save(tmp_path / "a.jsonl", [first, english(0)]))
    file = tmp_path / "out" / PAIRS_NAME

    stream = read_examples(SourceBlock(source=str(file)))
    again, plain = stream
    assert stream.format == "trl" and isinstance(again, Example) and isinstance(plain, Example)
    assert (again.language, again.tools, again.prompt) == ("en", tuple(tools), tuple(prompt))
    assert [completion.score for completion in again.completions] == [9.0, 2.0]
    turns = again.completions[0].messages
    assert turns[0]["tool_calls"][0]["function"] == {"name": "rain", "arguments": '{"town": "Köln"}'}
    assert [dict(turn) for turn in turns[1:]] == chosen[1:]
    assert [completion.score for completion in plain.completions] == [None, None]

    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == [
        "id",
        "prompt",
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
        "score_scale",
        "language",
        "source",
        "tools",
    ]
    assert is_conversational(loaded[0]) and json.loads(loaded[0]["tools"]) == tools
    assert loaded[1]["source"] == str(tmp_path / "a.jsonl") and loaded[1]["tools"] is None


def test_plain_messages_have_role_and_content_alone(tmp_path: Path) -> None:
    run(tmp_path, save(tmp_path / "a.jsonl", [english(0)]))
    row = rows_of(tmp_path / "out")[0]
    assert row["prompt"] == [{"role": "user", "content": english(0)["prompt"]}]
    assert row["chosen"] == [{"role": "assistant", "content": english(0)["chosen"]}]


def test_a_message_that_does_not_fit_the_file_is_a_bad_row(tmp_path: Path) -> None:
    odd = {
        "prompt": [{"role": "user", "content": "Who is it?", "mood": 3}],
        "chosen": [{"role": "assistant", "content": "It is me."}],
    }
    rows = [english(0), odd | {"rejected": [{"role": "assistant", "content": "It is you."}]}]
    with pytest.raises(DataError, match=r"line 2: a message has 'mood', which the prepared file cannot hold"):
        run(tmp_path, save(tmp_path / "a.jsonl", rows))


def test_the_folder_holds_report_page_pictures_and_nothing_else(tmp_path: Path) -> None:
    report = run(tmp_path, *messy(tmp_path), max_invalid=0.1)
    output = tmp_path / "out"
    names = ["lengths.png", PAIRS_NAME, "quarantine.jsonl", "report.json", "report.md", "scores.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    saved = json.loads((output / "report.json").read_bytes())
    assert saved["sha256"] == report.sha256 == fingerprint(output / PAIRS_NAME).sha256
    assert saved["pairs"]["kept"] == len(rows_of(output)) and saved["config"]["filters"]["min_chars"] == 10
    assert saved["peak_rss_bytes"] > 2**20 and saved["rows_per_s"] > 0
    page = (output / "report.md").read_text()
    assert f"| near_duplicate | {report.pairs['near_duplicate']} |" in page and report.sha256 in page
    for picture in ("lengths.png", "scores.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG") and f"![{picture}]({picture})" in page
    (line,) = (output / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["number"] == 13


def test_without_scores_and_bad_rows_there_is_no_picture_and_no_list_of_them(tmp_path: Path) -> None:
    run(tmp_path, save(tmp_path / "a.jsonl", [english(0)]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"lengths.png", PAIRS_NAME, "report.json", "report.md"}


def test_too_many_bad_rows_leave_a_list_and_nothing_else(tmp_path: Path) -> None:
    bad = [{"prompt": "Who?", "chosen": "", "rejected": "An answer"}] * 150
    source = save(tmp_path / "a.jsonl", [*map(english, range(50)), *bad])
    with pytest.raises(DataError) as caught:
        run(tmp_path, source, max_invalid=0.5)
    message = str(caught.value)
    assert f"{source}: 150 of 200 rows cannot be used (lines counted from 1)" in message
    assert "and 140 more" in message and "max_invalid=0.75 (now 0.5)" in message
    assert f"every bad row is in {tmp_path / 'out.quarantine.jsonl'}" in message
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.quarantine.jsonl"]


def test_nothing_left_says_where_everything_went(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", [pair("Who are you?", "Me", "You"), {"prompt": "Hm?", "completion": "Nothing"}])
    with pytest.raises(DataError, match=r"no pair is left of 2 rows \(1 rows single_answer, 1 pairs short\)"):
        run(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_language_without_pairs_is_named_with_the_cure(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", [english(0)])
    with pytest.raises(DataError, match=r"language zh and 0 are left \(pairs by language: en 1\); .* mix\.type=none"):
        run(tmp_path, source, mix={"type": "language"})


def test_an_output_that_exists_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out exists; set output to another folder, or remove it"):
        run(tmp_path, save(tmp_path / "a.jsonl", [english(0)]))


def test_the_command_with_settings_of_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    source = save(tmp_path / "a.jsonl", list(map(english, range(5))))
    recipe.write_text(f"sources: [{{source: {source}}}]\noutput: {tmp_path / 'out'}\n")
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe), "mix.type=none", "mix.size=3"])
    assert result.exit_code == 0, result.output
    assert f"pairs: {tmp_path / 'out' / PAIRS_NAME}" in result.output and "not_drawn" in result.output
    assert len(rows_of(tmp_path / "out")) == 3
    assert "Example: raylign data prepare" in CliRunner().invoke(app, ["data", "prepare", "--help"]).output
    refused = CliRunner().invoke(app, ["data", "prepare", str(recipe), "filters.min_char=3"])
    assert refused.exit_code == 1 and "filters.min_char: unknown key; did you mean 'min_chars'?" in refused.stderr


def test_the_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"^raylign (data prepare .*)$", (ROOT / "recipes/README.md").read_text(), re.MULTILINE)
    answers = [(one["prompt"], (one["chosen"], 5), (one["rejected"], 2)) for one in map(english, range(12))]
    save(tmp_path / "ratings_en.jsonl", [rated(*one) for one in answers])
    save(tmp_path / "pairs_zh.jsonl", list(map(chinese, range(12))))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    languages = Counter(row["language"] for row in rows_of(tmp_path / "prepared"))
    assert languages == {"en": 12, "zh": 5}
