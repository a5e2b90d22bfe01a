"""The config of `raylign data prepare`."""

from pathlib import Path
from typing import Any

import pytest

from raylign.config.load import dump_config, load_config, overridden, parse_tree
from raylign.config.prepare import PlainMixBlock, PrepareConfig
from raylign.errors import ConfigError

DEMO = Path(__file__).resolve().parents[3] / "recipes" / "data" / "prepare_demo.yaml"
SOURCES = {"sources": [{"source": "a.jsonl"}], "output": "out"}


def config(*overrides: str, **raw: Any) -> PrepareConfig:
    return parse_tree(overridden(SOURCES | raw, overrides), PrepareConfig, "config")


def test_the_demo_parses_and_has_the_defaults() -> None:
    demo = load_config(DEMO, kind=PrepareConfig)
    assert (demo.ratings, demo.filters, demo.mix) == (config().ratings, config().filters, config().mix)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = config("mix.type=source", "filters.near_duplicates=null", "ratings.names.honesty=null")
    (tmp_path / "config.yaml").write_text(dump_config(made))
    assert load_config(tmp_path / "config.yaml", kind=PrepareConfig) == made


def test_overrides_reach_every_depth() -> None:
    made = config("ratings.weights.verbosity=0", "filters.near_duplicates.jaccard=0.9", "mix.size=7500")
    assert (made.ratings.weights.verbosity, made.ratings.weights.correctness) == (0.0, 0.4)
    assert made.filters.near_duplicates is not None and made.filters.near_duplicates.jaccard == 0.9
    assert made.mix.size == 7500
    assert config("mix.type=none").mix == PlainMixBlock()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mix.shares.en=0.5"], r"mix\.shares: \{'en': 0\.5\} add up to 0\.5; give every language a share, 1 in all"),
        (["mix.type=langage"], r"mix\.type: unknown value 'langage'; did you mean 'language'\?"),
        (["mix.type=none", "mix.shares={en: 1}"], r"mix\.shares: unknown key"),
        (["filters.templates=['(']"], r"filters\.templates: '\(' is no regular expression"),
        (["filters.templates=['a*']"], r"filters\.templates: 'a\*' is found in every text"),
        (["ratings.weights.corectness=1"], r"ratings\.weights\.corectness: unknown key; did you mean 'correctness'\?"),
        (["sources=[{source: a.jsonl, wieght: 2}]"], r"sources\.0\.wieght: unknown key; did you mean 'weight'\?"),
        (["sources=[{source: a}, {source: a}]"], r"sources name 'a' 2 times; name it once"),
        (["sources=[]"], r"sources: .*at least 1 item"),
    ],
)
def test_mistakes_are_named_with_a_cure(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_no_attribute_that_counts_is_refused() -> None:
    names = ("correctness", "helpfulness", "coherence", "complexity", "verbosity")
    with pytest.raises(ConfigError, match=r"ratings\.weights: every weight is 0"):
        config(*[f"ratings.weights.{name}=0" for name in names])


def test_two_splits_of_one_source_have_names_of_their_own() -> None:
    made = config(sources=[{"source": "a"}, {"source": "a", "split": "test"}])
    assert [source.name for source in made.sources] == ["a", "a (test)"]
