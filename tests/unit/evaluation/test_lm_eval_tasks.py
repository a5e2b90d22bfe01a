"""Tasks of lm-eval over our log-probs, beside its own model of the same weights, where lm-eval is installed."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raylign.config.blocks import TrainerBlock
from raylign.errors import ConfigError, DataError
from raylign.evaluation.capability.likelihood import Encoder
from raylign.evaluation.capability.lm_eval_tasks import grouped, lm_eval_task
from raylign.records import Completions
from raylign.training.batches import Passes
from raylign.training.logprobs import CompletionLogps
from tests.unit.evaluation.test_capability_likelihood import WINDOW, model_of, tokenizer_of

ROWS = [
    {"question": "is it so?", "choices": ["it is", "no", "maybe not"], "gold": 0},
    {"question": "what is abcd?", "choices": ["its", "an end"], "gold": 1},
    {"question": "and then?", "choices": ["it ended", "a b", "c"], "gold": 2},
    {"question": "who?", "choices": ["a", "b"], "gold": 0},
]
TASK = """
task: tiny_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, kind: str = "multiple_choice") -> str:
    (folder / "quiz.json").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "tiny_quiz.yaml").write_text(TASK.format(data=folder / "quiz.json", kind=kind))
    return f"lm_eval:{folder}/tiny_quiz.yaml"


def test_without_lm_eval_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="has lm_eval:arc_easy, and lm-eval is not installed; pip install lm-eval"):
        lm_eval_task("lm_eval:arc_easy", Encoder(tokenizer_of(), 64, ""))


def test_pairs_with_one_context_are_one_row() -> None:
    encoder = Encoder(tokenizer_of(), 64, "")
    ids = {text: tuple(encoder.ids(text)) for text in ("x", "y", "b", "c")}
    assert grouped([("x", "b"), ("x", "c"), ("y", "c"), ("x", "b")], encoder) == [
        Completions(ids["x"], (ids["b"], ids["c"])),
        Completions(ids["y"], (ids["c"],)),
        Completions(ids["x"], (ids["b"],)),
    ]


@pytest.fixture
def lm_eval() -> ModuleType:
    found: ModuleType = pytest.importorskip("lm_eval")
    return found


def test_items_have_the_metrics_that_lm_eval_gives_its_own_model(lm_eval: ModuleType, tmp_path: Path) -> None:
    own: Any = sys.modules["lm_eval"]
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    theirs = HFLM(pretrained=model_of(), tokenizer=tokenizer_of(), max_length=64, device="cpu")
    task = lm_eval_task(write_task(tmp_path), Encoder(tokenizer_of(), 64, ""))
    assert (task.name, task.items, task.rows) == ("tiny_quiz", 4, 4)
    expected = own.evaluate(theirs, task.loaded, bootstrap_iters=0, log_samples=True)
    passes, module = Passes("shared", 1, torch.device("cpu")), CompletionLogps(model_of())
    kept: list[float] = []

    def logps(rows: Any) -> list[list[float]]:
        found = passes.logps(module, rows, 0, TrainerBlock())
        kept.extend(value for row in found for value in row)
        return found

    again = lm_eval_task(write_task(tmp_path), Encoder(tokenizer_of(), 64, ""))
    found = again.measure(logps, lambda rows: None)
    samples = sorted(expected["samples"]["tiny_quiz"], key=lambda sample: int(sample["doc_id"]))
    assert [dict(item.metrics) for item in found] == [{n: one[n] for n in ("acc", "acc_norm")} for one in samples]
    assert kept == pytest.approx([own[0] for one in samples for own in one["filtered_resps"]], abs=1e-4)


def test_tasks_that_cannot_be_asked_are_refused(lm_eval: ModuleType, tmp_path: Path) -> None:
    encoder = Encoder(tokenizer_of(), WINDOW, "generators.max_model_len")
    with pytest.raises(DataError, match="task tiny_quiz: a question has .* tokens, more than generators.max_model_len"):
        lm_eval_task(write_task(tmp_path), encoder)
    with pytest.raises(ConfigError, match=r"lm-eval has no task '.*none\.yaml'"):
        lm_eval_task(f"lm_eval:{tmp_path}/none.yaml", encoder)
    with pytest.raises(ConfigError, match="is of kind generate_until, and only multiple_choice"):
        lm_eval_task(write_task(tmp_path, "generate_until"), encoder)
