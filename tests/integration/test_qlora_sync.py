"""A 4-bit base reaches vLLM, which has loaded 16 bits, before anything is sampled; later versions and export follow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from actors.placement import plan_team
from actors.team import ActorTeam, team
from raylign.config import OnlineDpoConfig, parse_config
from raylign.errors import WeightSyncError
from raylign.export.policy import export_model
from raylign.records import Candidate, Preference, Prompt
from recipes.opening import serve_newest
from tests.fakes import quiet_incidents
from tests.unit.export.test_export import FACTS

pytestmark = pytest.mark.slow

_LIMIT = 0.02
_CONFIG = {
    "model": {"dtype": "float32", "lora": {"r": 8, "lora_alpha": 16}, "load_in_4bit": True},
    "trainer": {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    "placement": {"generator_cpus": 1, "trainer_cpus": 1},
    "generators": {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_gb": 0.1,
        "weight_sync": {"canary_max_gap": _LIMIT},
    },
}


@pytest.fixture(scope="module")
def config() -> OnlineDpoConfig:
    return parse_config(_CONFIG)


@pytest.fixture(scope="module")
def prompt(smollm2: str) -> Prompt:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "Tell me about a film in which nothing happens."}]
    return Prompt("p0", (), tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)))


@pytest.fixture(scope="module")
def roles(served_llama: str, config: OnlineDpoConfig, prompt: Prompt, lent: dict[str, float]) -> Iterator[ActorTeam]:
    start = team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=(prompt.token_ids,),
        plan=plan_team(config, lent),
        incidents=quiet_incidents(),
    )
    with start as roles:
        yield roles


def test_generators_serve_the_4_bit_policy(
    roles: ActorTeam, config: OnlineDpoConfig, prompt: Prompt, served_llama: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightSyncError, match="canary"):
        roles.publisher.verify()
    assert serve_newest(roles.publisher, config.model, None)["logprob_gap_mean"] < _LIMIT
    assert roles.publisher.verify()["logprob_gap_mean"] < _LIMIT

    tokenizer = AutoTokenizer.from_pretrained(served_llama)
    pair = tuple(
        Candidate("p0", i, tuple(tokenizer(text)["input_ids"]), (), text, "stop", 0, 0)
        for i, text in enumerate(("Nothing happens, beautifully.", "It is a film."))
    )
    pairs = roles.trainers.with_reference([Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0))] * 4, 0, 0)
    assert len(list(roles.trainers.train(pairs, seed=0))) == 2
    assert roles.publisher.publish(1)["logprob_gap_mean"] < _LIMIT

    roles.trainers.save_weights(str(tmp_path / "pushed.safetensors"))
    roles.trainers.save_adapter(str(tmp_path / "adapter"))
    exported = export_model(tmp_path / "adapter", served_llama, tmp_path / "out", True, FACTS, config.model)
    pushed, merged = load_file(tmp_path / "pushed.safetensors"), load_file(exported / "model.safetensors")
    assert pushed.keys() == merged.keys()
    assert all(torch.equal(pushed[name], merged[name]) for name in pushed)
