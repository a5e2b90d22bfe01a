"""Weight sync between GPUs: NCCL with a device each, shared memory on one device, the adapter alone."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from actors.placement import plan_team
from actors.team import team
from raylign.config import parse_config
from raylign.records import Candidate, Preference, Prompt
from tests.fakes import quiet_incidents

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

_TRANSPORTS: dict[str, dict[str, Any]] = {
    "nccl": {"placement": {"mode": "disaggregated"}, "generators": {"weight_sync": {"transport": "nccl"}}},
    "shm": {"generators": {"gpu_memory_utilization": 0.4, "weight_sync": {"transport": "shm"}}},
    "lora": {
        "model": {"lora": {"r": 8}},
        "generators": {"gpu_memory_utilization": 0.4, "weight_sync": {"transport": "lora"}},
    },
}


@pytest.mark.parametrize("name", _TRANSPORTS)
def test_training_reaches_the_generators(name: str, smollm2: str, resources: dict[str, float]) -> None:
    needed = 2 if name == "nccl" else 1
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA devices")
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    chat = ({"role": "user", "content": "What is the capital of France?"},)
    prompt = Prompt("p0", chat, tuple(tokenizer.apply_chat_template(list(chat), return_dict=False)))
    pair = tuple(
        Candidate("p0", i, tuple(tokenizer(text)["input_ids"]), (), text, "stop", 0, 0)
        for i, text in enumerate(("Rome, of course.", "The capital is Paris."))
    )
    config = parse_config(
        {
            "placement": {"device": "gpu", "generator_cpus": 1, "trainer_cpus": 1},
            "trainer": {"learning_rate": 1e-4},
            **_TRANSPORTS[name],
        }
    )
    with team(
        config,
        folder=smollm2,
        pad_id=2,
        canary_ids=(prompt.token_ids,),
        plan=plan_team(config, resources),
        incidents=quiet_incidents(),
    ) as roles:
        roles.publisher.verify()
        eight = [Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0))] * 8
        preferences = roles.trainers.with_reference(eight, seed=0, rounds_done=0)
        for version in (1, 2):
            list(roles.trainers.train(preferences, seed=version))
            roles.publisher.publish(version)
