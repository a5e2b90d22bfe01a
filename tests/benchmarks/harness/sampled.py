"""Preferences that a bare clone can make: sampled from the embedded model, told apart by VADER, kept in .cache."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from raylign.chunks import chunks
from raylign.models import load_tokenizer, resolve_model
from raylign.run.files import publish_text
from tests.benchmarks.harness.children import ROOT

MODEL = "embedded:smollm2-135m"
CANDIDATES = 4
GAP = 0.2
"""Least difference of VADER's compound scores (-1 to 1) between the best and the worst candidate of a prompt."""
CACHE = ROOT / ".cache/benchmarks"
_VERSION = 1
"""Raised whenever the same arguments would give other pairs."""
_PROMPTS_AT_ONCE = 16
SYSTEM = "You review films."
_ASKED = ("Review", "Judge", "Describe", "Say something about", "Give your opinion on", "Rate", "Discuss", "Sum up")
_PARTS = ("music", "plot", "ending", "cast", "script", "camera", "first act", "lead actor", "villain", "dialogue")
_FILMS = ("a comedy", "a western", "a war film", "a love story", "a cartoon", "a thriller", "a musical", "a drama")

Row = dict[str, Any]


def sampled_pairs(count: int, new_tokens: int, say: Callable[[str], None], seed: int = 0) -> Path:
    """A file of `count` pairs in LLaMA-Factory's ShareGPT format, each of another prompt, made at its first use.

    The chosen completion is the one of CANDIDATES that VADER likes best, the rejected one that it likes least; each has
    at most `new_tokens` tokens. The same arguments give the same pairs, up to what a processor rounds otherwise.
    """
    path = CACHE / f"pairs-{count}-of-{new_tokens}-seed-{seed}-v{_VERSION}.json"
    if not path.exists():
        say(f"sampling {count} pairs of {MODEL}, once for all later benchmarks")
        rows: list[Row] = []
        for row in _pairs(new_tokens, seed):
            rows.append(row)
            if len(rows) % 50 == 0:
                say(f"{len(rows)} pairs")
            if len(rows) == count:
                break
        else:
            raise SystemExit(f"{len(rows)} pairs can be made, {count} are wanted; give a file of your own")
        publish_text(path, json.dumps(rows, indent=1))
    return path


def _pairs(new_tokens: int, seed: int) -> Iterator[Row]:
    folder = resolve_model(MODEL)
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    analyser = SentimentIntensityAnalyzer()
    prompts = [f"{asked} the {part} of {film}." for asked, part, film in product(_ASKED, _PARTS, _FILMS)]
    random.Random(seed).shuffle(prompts)
    for number, some in enumerate(chunks(prompts, _PROMPTS_AT_ONCE)):
        torch.manual_seed(seed * len(prompts) + number)
        for prompt, texts in zip(some, completions(model, tokenizer, some, new_tokens), strict=True):
            scores = {text: analyser.polarity_scores(text)["compound"] for text in texts}
            best, worst = max(texts, key=scores.__getitem__), min(texts, key=scores.__getitem__)
            if scores[best] - scores[worst] >= GAP:
                yield _row(prompt, best, worst)


def completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> Iterator[list[str]]:
    """CANDIDATES texts for each prompt, sampled at temperature 1."""
    turns = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}] for prompt in prompts]
    given: Any = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids, mask = given["input_ids"], given["attention_mask"]
    # Prompts are read once for all their candidates, but for the last token, from which sampling starts.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, :-1]
    with torch.no_grad():
        read = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, logits_to_keep=1).past_key_values
    read.batch_repeat_interleave(CANDIDATES)
    sampled = model.generate(
        ids.repeat_interleave(CANDIDATES, 0),
        attention_mask=mask.repeat_interleave(CANDIDATES, 0),
        past_key_values=read,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(sampled[:, ids.shape[1] :], skip_special_tokens=True)
    return chunks([text.strip() for text in texts], CANDIDATES)


def _row(prompt: str, best: str, worst: str) -> Row:
    turns = [{"from": "system", "value": SYSTEM}, {"from": "human", "value": prompt}]
    return {"conversations": turns} | {
        name: {"from": "gpt", "value": text} for name, text in (("chosen", best), ("rejected", worst))
    }
