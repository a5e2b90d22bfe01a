"""Benchmarks start in a clone that has nothing beside it, and what they sample there is the model's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.models import load_tokenizer, resolve_model
from tests.benchmarks.harness import sampled
from tests.benchmarks.harness.pairs import read_pairs
from tests.unit.tiny_models import SMALL

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "tests/benchmarks").glob("*.py"))
SMALLER = {"prepare_million": ["--rows", "200000"]}
BEGUN = """
import json, os, runpy, subprocess, sys

class Begun(BaseException):
    pass

class Popen(subprocess.Popen):
    def __init__(self, args, *rest, **options):
        if args[0] == sys.executable:
            sources = [word.removeprefix("data.source=") for word in args if word.startswith("data.source=")]
            missing = [source for source in sources if not os.path.exists(source)]
            raise FileNotFoundError(*missing) if missing else Begun
        super().__init__(args, *rest, **options)

def pairs(new_tokens, seed):
    while True:
        turns = [{"from": "human", "value": "Well?"}]
        answers = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
        yield {"conversations": turns} | answers

subprocess.Popen = Popen
from tests.benchmarks.harness import sampled
sampled._pairs = pairs
ends = {}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = [name, *words]
    try:
        runpy.run_path(os.path.join("tests", "benchmarks", f"{name}.py"), run_name="__main__")
    except Begun:
        ends[name] = "began"
    except BaseException as error:
        ends[name] = repr(error)
    else:
        ends[name] = "ended"
print(json.dumps(ends))
"""
"""Runs every benchmark up to the first process that it starts for its work; sampling takes minutes and is left out."""


@pytest.mark.slow
def test_every_benchmark_starts_in_a_bare_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for folder in ("platform", "actors", "recipes", "tests", "deploy"):
        shutil.copytree(ROOT / folder, clone / folder)
    asked = {name: SMALLER.get(name, []) for name in BENCHMARKS}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(clone), str(clone / "platform")])}
    done = subprocess.run(
        [sys.executable, "-c", BEGUN, json.dumps(asked)],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(BENCHMARKS, "began"), done.stderr


def test_prompts_read_once_give_what_plain_sampling_gives() -> None:
    folder = resolve_model(sampled.MODEL)
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)})).eval()
    prompts = ["Why?", "Describe the music of a western in a few words."]
    turns = [[{"role": "system", "content": sampled.SYSTEM}, {"role": "user", "content": prompt}] for prompt in prompts]
    given: Any = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(1)
    plain = model.generate(
        **given,
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        num_return_sequences=sampled.CANDIDATES,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(plain[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    torch.manual_seed(1)
    found = list(sampled.completions(model, tokenizer, prompts, 6))
    assert [text for group in found for text in group] == [text.strip() for text in texts]
    assert len({text for group in found for text in group}) == len(texts)


def test_the_chosen_completion_is_the_one_that_vader_likes_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def completions(model: object, tokenizer: object, prompts: list[str], new_tokens: int) -> list[list[str]]:
        calls.append(new_tokens)
        alike = [["A film.", "The film.", "Films.", "A film."]]
        return alike + [["It is fine.", "A horrible failure!", "A film.", "A wonderful, great joy!"]] * (
            len(prompts) - 1
        )

    monkeypatch.setattr(sampled, "CACHE", tmp_path)
    monkeypatch.setattr(sampled, "completions", completions)
    path = sampled.sampled_pairs(20, 7, print)
    rows = json.loads(path.read_text())
    assert {(row["chosen"]["value"], row["rejected"]["value"]) for row in rows} == {
        ("A wonderful, great joy!", "A horrible failure!")
    }
    assert len({row["conversations"][-1]["value"] for row in rows}) == 20
    assert sampled.sampled_pairs(20, 7, print) == path and calls == [7, 7]
    pairs = read_pairs(path, load_tokenizer(resolve_model(sampled.MODEL)), 20, 512)
    assert all(pair.chosen != pair.rejected for pair in pairs)


def test_more_pairs_than_can_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "CACHE", tmp_path)
    monkeypatch.setattr(
        sampled, "completions", lambda model, tokenizer, prompts, new_tokens: [["Same."] * 4] * len(prompts)
    )
    with pytest.raises(SystemExit, match="0 pairs can be made, 3 are wanted"):
        sampled.sampled_pairs(3, 7, print)
