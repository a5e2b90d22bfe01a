"""Made-up rated rows in UltraFeedback's format, streamed to a file: how many of each kind is known."""

import json
import random
from collections import Counter, deque
from pathlib import Path
from typing import Any

WORDS = 20_000
REMEMBERED = 1000
CHINESE = 0.35
KINDS = {"exact_duplicate": 0.05, "near_duplicate": 0.05, "template": 0.03, "short": 0.02, "bad": 0.001}
TEMPLATE = {"en": "As an AI language model, I cannot say.", "zh": "作为一个人工智能语言模型，我无法回答。"}
ENGLISH = [
    "the",
    "and",
    "of",
    "to",
    "that",
    "what",
    "how",
    "with",
    "this",
    "you",
    "your",
    "which",
    "are",
    "from",
    "have",
]


def write_rows(path: Path, count: int, seed: int) -> dict[str, int]:
    """Write `count` rows; returns how many of each of KINDS they are, "plain" the others."""
    draw, made = random.Random(seed), Counter[str]({kind: 0 for kind in KINDS})
    words = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{number:x}" for number in range(WORDS)]
    earlier: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            kind = draw.choices([*KINDS, "plain"], [*KINDS.values(), 1 - sum(KINDS.values())])[0]
            if kind.endswith("duplicate") and not earlier:
                kind = "plain"
            made[kind] += 1
            row = _row(kind, draw, words, earlier)
            if kind == "plain":
                earlier.append(row)
            stream.write(f"{json.dumps(row, ensure_ascii=False)}\n")
    return dict(made)


def _row(kind: str, draw: random.Random, words: list[str], earlier: deque[dict[str, Any]]) -> dict[str, Any]:
    if kind == "exact_duplicate":
        return draw.choice(earlier)
    if kind == "near_duplicate":
        row = draw.choice(earlier)
        return row | {"instruction": f"{row['instruction']} {draw.choice(words)}"}
    language = "zh" if draw.random() < CHINESE else "en"
    answers = [_text(language, 60, draw, words) for _ in range(2)]
    if kind == "template":
        answers[0] = f"{TEMPLATE[language]} {answers[0]}"
    if kind == "short":
        answers[1] = "ok"
    marks = draw.sample(["1", "2", "3", "4", "5"], 2)
    completions = [{"response": text, "annotations": _ratings(mark)} for text, mark in zip(answers, marks, strict=True)]
    if kind == "bad":
        completions = []
    return {"instruction": _text(language, 25, draw, words), "completions": completions}


def _ratings(mark: str) -> dict[str, Any]:
    return {name: {"Rating": mark} for name in ("helpfulness", "honesty", "truthfulness", "instruction_following")}


def _text(language: str, length: int, draw: random.Random, words: list[str]) -> str:
    if language == "zh":
        return "".join(map(chr, draw.choices(range(0x4E00, 0x9F00), k=2 * length)))
    common = draw.choices(ENGLISH, k=length // 3)
    return " ".join([part for pair in zip(common, draw.choices(words, k=length // 3), strict=True) for part in pair])
