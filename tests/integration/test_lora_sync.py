"""The adapter alone travels: vLLM's hot swap follows the trainer, and old prefixes are forgotten."""

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer

from actors.placement import plan_team
from actors.team import ActorTeam, team
from raylign.config import parse_config
from raylign.errors import WeightSyncError
from raylign.records import Candidate, Completions, Preference, Prompt
from raylign.sampling.decoding import Decoding
from tests.fakes import quiet_incidents
from tests.faults import record

pytestmark = pytest.mark.slow

_CONFIG = {
    "model": {"dtype": "float32", "lora": {"r": 4, "lora_alpha": 8}},
    "trainer": {"per_device_train_batch_size": 1, "learning_rate": 3e-2, "lr_scheduler_type": "constant"},
    "placement": {"generator_cpus": 1, "trainer_cpus": 1},
    "generators": {
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_gb": 0.1,
        "weight_sync": {"transport": "lora", "canary_max_gap": 0.02},
    },
    "sampling": {"reference_generations": 1},
    "pairing": {"type": "policy_reference"},
    "loss": {"loss_type": "mix", "losses": [{"loss_type": "sigmoid"}, {"loss_type": "xpo"}], "loss_weights": [1, 1e-4]},
}
_LONG = "Tell me about a film in which nothing happens. " * 20


@pytest.fixture(scope="module")
def prompt(served_llama: str) -> Prompt:
    tokenizer: Any = AutoTokenizer.from_pretrained(served_llama)
    chat = ({"role": "user", "content": _LONG},)
    return Prompt(
        "p0", chat, tuple(tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=False))
    )


@pytest.fixture(scope="module")
def pair(served_llama: str) -> tuple[Candidate, ...]:
    tokenizer = AutoTokenizer.from_pretrained(served_llama)
    return tuple(
        Candidate("p0", i, tuple(tokenizer(text)["input_ids"]), (), text, "stop", 0, 0)
        for i, text in enumerate(("Nothing happens, beautifully.", "It is a film."))
    )


@pytest.fixture(scope="module")
def roles(served_llama: str, prompt: Prompt, lent: dict[str, float]) -> Iterator[ActorTeam]:
    config = parse_config(_CONFIG)
    with team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=(prompt.token_ids[-40:],),
        plan=plan_team(config, lent),
        incidents=quiet_incidents(),
    ) as roles:
        yield roles


def _first_logprob(roles: ActorTeam, prompt: Prompt, version: int) -> tuple[int, float]:
    """Token and log-prob of one greedy step after a prompt long enough to fill prefix-cache blocks."""
    greedy = Decoding(num_generations=1, max_new_tokens=1, temperature=0.0, top_p=1.0, top_k=0)
    found = roles.generators.sample([prompt], greedy, seed=0, round_index=0, version=version, advance=lambda n: None)
    return found[0].token_ids[0], found[0].logprobs[0]


def test_adapter_swap_follows_the_trainer(roles: ActorTeam, prompt: Prompt, pair: tuple[Candidate, ...]) -> None:
    roles.publisher.verify()
    before = _first_logprob(roles, prompt, version=0)
    four = [Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0))] * 4
    preferences = roles.trainers.with_reference(four, seed=0, rounds_done=0)
    for version in (1, 2):
        assert len(list(roles.trainers.train(preferences, seed=version))) == 4
        with pytest.raises(WeightSyncError, match="canary"):
            roles.publisher.verify()
        gaps = roles.publisher.publish(version)
        assert gaps["logprob_gap_mean"] < 0.02
        token, logprob = _first_logprob(roles, prompt, version)
        assert (token, logprob) != before
        expected = roles.trainers.token_logps([(*prompt.token_ids, token)])[0][-1]
        assert logprob == pytest.approx(expected, abs=0.02)


def _sampled(roles: ActorTeam, prompt: Prompt, version: int, reference_generations: int) -> list[Candidate]:
    decoding = Decoding(4, 8, 1.0, 1.0, 0, reference_generations)
    return roles.generators.sample([prompt], decoding, seed=5, round_index=1, version=version, advance=lambda n: None)


def test_the_reference_answers_beside_the_adapter(
    roles: ActorTeam, prompt: Prompt, pair: tuple[Candidate, ...]
) -> None:
    """Its log-probs are those of the model before round 1, in a batch with the policy's, which are the adapter's."""
    four = roles.trainers.with_reference([Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0))] * 4, seed=0, rounds_done=0)
    assert len(list(roles.trainers.train(four, seed=3))) == 4
    roles.publisher.publish(3)
    found = _sampled(roles, prompt, version=3, reference_generations=2)
    assert [(c.index, c.policy_version, c.seed - found[0].seed) for c in found] == [
        (0, 3, 0),
        (1, 3, 1),
        (2, 0, 2),
        (3, 0, 3),
    ]

    ids = [(*prompt.token_ids, *candidate.token_ids) for candidate in found]
    of_policy = [logps[-len(c.token_ids) :] for c, logps in zip(found, roles.trainers.token_logps(ids), strict=True)]
    rows = [Completions(prompt.token_ids, (candidate.token_ids,)) for candidate in found]
    of_base = [math.fsum(row[0]) for row in roles.trainers.reference_logprobs(rows)]
    for candidate, policy, base in zip(found, of_policy, of_base, strict=True):
        own, other = (math.fsum(policy), base) if candidate.policy_version else (base, math.fsum(policy))
        assert math.fsum(candidate.logprobs) == pytest.approx(own, abs=0.05)
        assert abs(own - other) > 0.2

    preference = Preference(prompt, (found[0], found[3]), (1.0, 0.0), (1.0, 1.0))
    (step,) = roles.trainers.train(roles.trainers.with_reference([preference], 0, 3), seed=0, rounds_done=3)
    assert step["loss/xpo"] == pytest.approx(math.fsum(of_policy[3]), abs=0.05)
    assert step["loss"] == pytest.approx(step["loss/sigmoid"] + 1e-4 * step["loss/xpo"], abs=1e-6)


@pytest.mark.long_fault
def test_a_dead_generator_is_replaced_and_serves_the_adapter(roles: ActorTeam, prompt: Prompt) -> None:
    roles.publisher.publish(2)
    before = _first_logprob(roles, prompt, version=2)
    killed = time.monotonic()
    ray.kill(roles.generators.handles[0])
    assert _first_logprob(roles, prompt, version=2) == pytest.approx(before)
    record(
        "the only generator dies, with an adapter served",
        "its actor killed",
        recovered_s=time.monotonic() - killed,
        lost="nothing: the replacement gets the adapter of that version and answers the same",
    )
