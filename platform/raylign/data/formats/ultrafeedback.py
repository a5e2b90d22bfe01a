"""OpenBMB's UltraFeedback: several rated answers to an instruction; its binarized forms, and OpenCSG's in Chinese."""

import re
from collections.abc import Mapping
from dataclasses import replace

from raylign.data.examples import Completion
from raylign.data.formats import trl
from raylign.data.formats.parts import (
    BadRow,
    Cells,
    Parts,
    answer_of,
    check_text_only,
    number,
    pair,
    prompt_of,
    rating,
    required,
    text,
    used,
)

ATTRIBUTES = ("instruction_following", "truthfulness", "honesty", "helpfulness")
COLUMNS = (
    ("instruction", "completions"),
    ("instruction", "chosen_response", "rejected_response"),
    ("prompt", "chosen", "rejected"),
)
SCALES: Mapping[str, tuple[float, float]] = dict.fromkeys(ATTRIBUTES, (1.0, 5.0))
SIDES = ("chosen", "rejected")
UNRATED = ("N/A", "NA")


def parse(row: Cells) -> Parts:
    """One row in any of the shapes of `COLUMNS`. Ratings that say N/A are left out. Raises BadRow.

    `score` is the source's `overall_score`.
    """
    if "instruction" not in row and "prompt" in row:
        return trl.parse(row)
    check_text_only(row)
    prompt = prompt_of(text(row, "instruction"))
    if "completions" not in row:
        columns = [f"{side}_{part}" for side in SIDES for part in ("response", "rating")]
        chosen, rejected = (answer_of(f"{side}_response", text(row, f"{side}_response")) for side in SIDES)
        verdicts = [_verdict(f"{side}_rating", row.get(f"{side}_rating")) for side in SIDES]
        (better, above), (worse, below) = verdicts
        completions = pair(chosen, rejected, (better, worse), (above, below))
        return Parts(prompt, completions, True, used(row, ("instruction", *columns)))
    given = required(row, "completions")
    if not isinstance(given, list) or not given:
        raise BadRow("completions is no list of answers", given, "give at least one answer or remove the row")
    rated = tuple(_completion(f"completion {index}", item) for index, item in enumerate(given))
    return Parts(prompt, rated, False, used(row, ("instruction", "completions")))


def _completion(name: str, item: object) -> Completion:
    if not isinstance(item, dict):
        raise BadRow(f"{name} is a {type(item).__name__}", item, "give an object with response and annotations")
    response = item.get("response")
    if not isinstance(response, str):
        raise BadRow(f"the response of {name} is no string", item, "give a string")
    score, ratings = _verdict(name, item.get("annotations"))
    if item.get("overall_score") is not None:
        score = number(f"overall_score of {name}", item["overall_score"])
    if score is None and not ratings:
        raise BadRow(f"{name} has no ratings", item, "give annotations or overall_score")
    return Completion(answer_of(f"the response of {name}", response), score, ratings)


def _verdict(name: str, given: object) -> tuple[float | None, dict[str, float]]:
    """(overall score, ratings) of an object of verdicts; each is a number or an object with `Rating`."""
    if given is None:
        return None, {}
    if not isinstance(given, dict):
        return number(name, given), {}
    score = given.get("overall_score")
    ratings = {}
    for attribute in ATTRIBUTES:
        verdict = given.get(attribute)
        value = verdict.get("Rating") if isinstance(verdict, dict) else verdict
        if value is None or (isinstance(value, str) and value.strip().upper() in UNRATED):
            continue
        ratings[attribute] = rating(f"{attribute} of {name}", value, SCALES[attribute])
    return None if score is None else number(f"overall_score of {name}", score), ratings


CHINESE = re.compile(r"[\u4e00-\u9fff]")


def parse_chinese(row: Cells) -> Parts:
    """One row of OpenCSG's UltraFeedback-chinese: the same shapes, with Chinese text. Raises BadRow."""
    return replace(parse(row), language="zh")


def is_chinese(value: object) -> bool:
    """Whether a cell is text with a Chinese character."""
    return isinstance(value, str) and CHINESE.search(value) is not None
