"""A reward model and an implicit reward in a scorer actor, on real Ray."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from actors.scorer.client import ACTOR, ScorerActor, ScorerClient
from actors.supervision.incidents import Incidents
from actors.supervision.slot import Supervision
from raylign.config import parse_config
from raylign.config.blocks import RecoveryBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt
from raylign.scoring.base import Compute
from tests.integration.tiny import START_S

TEXTS = ["Yes.", "No, never.", "It is a good film, and I would see it again."]


def save_reward_model(folder: Path, tokenizer: str) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options: dict[str, Any] = {"vocab_size": 49152, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.2}
    config = LlamaConfig(**options | sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def test_models_score_in_their_actor(resources: Mapping[str, float], tmp_path: Path, tiny_llama: str) -> None:
    prompt = Prompt("p", ({"role": "user", "content": "Is it good?"},), (1,))
    candidates = [Candidate("p", i, (1,), (0.0,), text, "stop", 0, 0) for i, text in enumerate(TEXTS)]
    path = save_reward_model(tmp_path / "reward", tiny_llama)
    scorers = {
        "reward": {"type": "reward_model", "path": path, "dtype": "float32", "batch_size": 2},
        "drift": {"type": "implicit", "policy_path": tiny_llama, "reference_path": tiny_llama, "dtype": "float32"},
    }
    whole = {"type": "weighted", "scorers": scorers, "weights": {"reward": 2.0, "drift": 1.0}}
    block = parse_config({"scoring": whole}).scoring
    handles: list[ActorHandle[Any]] = []

    def spawn() -> ActorHandle[Any]:
        places = (str(tmp_path / "scores.sqlite"), str(tmp_path / "stacks"), ACTOR)
        handles.append(ScorerActor.options(num_cpus=1).remote(block, *places, Compute(threads=1)))
        return handles[-1]

    incidents = Incidents(RecoveryBlock(), lambda *entry: None)
    supervision = Supervision("scorer", ScorerError, incidents, tmp_path / "stacks")
    client = ScorerClient(spawn, block, supervision, start_timeout_s=START_S)
    try:
        client.wait_ready()
        first, taken = client.score([prompt], candidates), client.metrics()
        again, kept = client.score([prompt], candidates), client.metrics()
    finally:
        ray.kill(handles[0])
    assert again == first and kept["reward/cache_hits"] == kept["drift/cache_hits"] == 3
    assert (taken["reward/items"], taken["drift/items"], taken["reward/failures"]) == (3, 3, 0)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for text, score in zip(TEXTS, first, strict=True):
        turns: list[Any] = [*prompt.messages, {"role": "assistant", "content": text}]
        ids: Any = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            expected = float(model(input_ids=ids).logits)
        assert score.parts["reward"] == pytest.approx(expected, abs=1e-5)
        assert score.parts["drift"] == 0.0 and score.value == pytest.approx(2 * expected, abs=1e-5)
