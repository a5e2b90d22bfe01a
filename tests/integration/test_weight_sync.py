"""Real vLLM, real ZeRO-3 ranks: what is served equals what the trainer holds, and bad pushes change nothing.

fp32, so that vLLM and transformers agree closely enough to compare greedy tokens; a small model, whose head is tied.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.placement import plan_team
from actors.supervision.processes import process_of
from actors.team import ActorTeam, team
from actors.weight_sync.manifest import checkpoint_manifest, file_manifest, require_same
from raylign.config import OnlineDpoConfig, parse_config
from raylign.errors import GeneratorError, WeightSyncError
from raylign.records import Candidate, Preference, Prompt
from raylign.roles import Generator, NodePath
from raylign.sampling.decoding import Decoding
from tests.fakes import quiet_incidents
from tests.integration.listeners import listening, outside
from tests.processes import alive, descendants, engine_core

pytestmark = pytest.mark.slow

GREEDY = Decoding(num_generations=1, max_new_tokens=16, temperature=0.0, top_p=1.0, top_k=0)
_LOGP_TOLERANCE = 0.02
_QUESTIONS = ("What is the capital of France?", "Write one sentence about a film with a quiet ending.")


def _config() -> OnlineDpoConfig:
    return parse_config(
        {
            "model": {"dtype": "float32"},
            "trainer": {"ranks": 2, "zero_stage": 3, "per_device_train_batch_size": 1, "learning_rate": 5e-3},
            "generators": {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_gb": 0.1},
            "placement": {"generator_cpus": 1, "trainer_cpus": 1},
        }
    )


@pytest.fixture(scope="module")
def prompts(served_llama: str) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(served_llama)
    encode = tokenizer.apply_chat_template
    chats = [({"role": "user", "content": question},) for question in _QUESTIONS]
    ids = [tuple(encode(list(chat), add_generation_prompt=True, return_dict=False)) for chat in chats]
    return [Prompt(f"p{i}", chat, tokens) for i, (chat, tokens) in enumerate(zip(chats, ids, strict=True))]


@pytest.fixture(scope="module")
def roles(served_llama: str, prompts: list[Prompt], lent: dict[str, float]) -> Iterator[ActorTeam]:
    config, canary = _config(), tuple(prompt.token_ids for prompt in prompts)
    with team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=canary,
        plan=plan_team(config, lent),
        incidents=quiet_incidents(),
    ) as roles:
        yield roles


class _Version:
    """Counts published versions across the tests of this module."""

    current = 0


def _greedy(roles: ActorTeam, prompts: list[Prompt]) -> list[Candidate]:
    """One prompt at a time: what shares a batch changes the last bits of log-probs."""
    sample, version = roles.generators.sample, _Version.current
    return [
        candidate
        for prompt in prompts
        for candidate in sample([prompt], GREEDY, seed=0, round_index=0, version=version, advance=lambda count: None)
    ]


def _push(roles: ActorTeam, weights: Mapping[str, Tensor], folder: Path, served_llama: str) -> None:
    path = folder / "pushed.safetensors"
    save_file(dict(weights), path, {"format": "pt"})
    require_same(checkpoint_manifest(Path(served_llama)), file_manifest(path))
    version = _Version.current + 1
    roles.generators.call("loading weights", 120, Generator.take_weights, NodePath(str(path)), version)
    _Version.current += 1


def _expected(
    served_llama: str, weights: Mapping[str, Tensor], prompts: list[Prompt]
) -> list[tuple[list[int], Tensor]]:
    """Greedy tokens and prompt log-probs of plain transformers under `weights`."""
    model: Any = AutoModelForCausalLM.from_pretrained(served_llama, dtype=torch.float32)
    model.load_state_dict(dict(weights), strict=False)
    model.tie_weights()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append((tokens[0, ids.shape[1] :].tolist(), logps))
    return found


def _assert_serves(roles: ActorTeam, served_llama: str, weights: Mapping[str, Tensor], prompts: list[Prompt]) -> None:
    served = _greedy(roles, prompts)
    for prompt, candidate, (tokens, logps) in zip(
        prompts, served, _expected(served_llama, weights, prompts), strict=True
    ):
        assert list(candidate.token_ids) == tokens[: len(candidate.token_ids)]
        found: list[float] = ray.get(roles.generators.handles[0].token_logps.remote(prompt.token_ids))
        assert torch.tensor(found) == pytest.approx(logps, abs=_LOGP_TOLERANCE)


def _originals(served_llama: str) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(Path(served_llama) / "model.safetensors").items()}


def _noised(weights: Mapping[str, Tensor], only: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator) if only in name else tensor
        for name, tensor in weights.items()
    }


def test_generator_serves_the_base_model_at_start(roles: ActorTeam, served_llama: str, prompts: list[Prompt]) -> None:
    gaps = roles.publisher.verify()
    assert gaps["logprob_gap_max"] < _LOGP_TOLERANCE
    _assert_serves(roles, served_llama, _originals(served_llama), prompts)


@pytest.fixture(scope="module")
def generator(roles: ActorTeam) -> psutil.Process:
    return psutil.Process(process_of(roles.generators.handles[0]).pid)


def test_an_engine_listens_on_loopback_alone(generator: psutil.Process) -> None:
    assert listening(generator), "its own listeners"
    assert outside(listening()) == {}


def test_an_engine_is_a_fork_of_a_process_that_imported_vllm(generator: psutil.Process) -> None:
    """Spawned by vLLM it would import it once more, after the actor has."""
    assert alive(engine_core(generator).pid)
    spawned = [line for line in descendants(generator).values() if "multiprocessing.spawn" in line]
    assert spawned == []


def test_pushed_weights_are_served_and_originals_come_back_exactly(
    roles: ActorTeam, served_llama: str, prompts: list[Prompt], tmp_path: Path
) -> None:
    originals = _originals(served_llama)
    before = _greedy(roles, prompts)
    noised = _noised(originals)
    _push(roles, noised, tmp_path, served_llama)
    _assert_serves(roles, served_llama, noised, prompts)
    changed = _greedy(roles, prompts)
    assert [c.token_ids for c in changed] != [c.token_ids for c in before]
    assert {c.policy_version for c in changed} == {_Version.current}
    _push(roles, originals, tmp_path, served_llama)
    restored = _greedy(roles, prompts)
    assert [(c.token_ids, c.logprobs) for c in restored] == [(c.token_ids, c.logprobs) for c in before]


def test_tied_embeddings_reach_the_output_head(
    roles: ActorTeam, served_llama: str, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Only the embedding changes: a head that kept its old copy would give other log-probs."""
    originals = _originals(served_llama)
    embedding = _noised(originals, only="embed_tokens")
    _push(roles, embedding, tmp_path, served_llama)
    _assert_serves(roles, served_llama, embedding, prompts)
    _push(roles, originals, tmp_path, served_llama)


@pytest.mark.parametrize("fault", ["shape", "missing", "unknown"])
def test_a_wrong_file_is_refused_before_anything_is_touched(
    roles: ActorTeam, served_llama: str, prompts: list[Prompt], tmp_path: Path, fault: str
) -> None:
    before = _greedy(roles, prompts)
    weights = _noised(_originals(served_llama))
    norm = weights.pop("model.norm.weight")
    weights |= {"shape": {"model.norm.weight": norm[:-1]}, "missing": {}, "unknown": {"model.norm.weights": norm}}[
        fault
    ]
    with pytest.raises(WeightSyncError, match=r"nothing was changed.*model\.norm\.weight"):
        _push(roles, weights, tmp_path, served_llama)
    after = _greedy(roles, prompts)
    assert [(c.token_ids, c.logprobs) for c in after] == [(c.token_ids, c.logprobs) for c in before]


def test_another_version_is_refused(roles: ActorTeam, prompts: list[Prompt]) -> None:
    with pytest.raises(GeneratorError, match="expected 99"):
        roles.generators.sample(prompts, GREEDY, seed=0, round_index=0, version=99, advance=lambda count: None)


def test_seeds_make_a_prompt_reproducible(roles: ActorTeam, prompts: list[Prompt]) -> None:
    decoding = Decoding(num_generations=4, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0)

    def draw(which: list[Prompt], round_index: int) -> list[Candidate]:
        return roles.generators.sample(
            which, decoding, seed=5, round_index=round_index, version=_Version.current, advance=lambda count: None
        )

    both, alone, later = draw(prompts, 1), draw(prompts[:1], 1), draw(prompts[:1], 2)
    assert [(c.prompt_id, c.index) for c in both] == [(p.id, i) for p in prompts for i in range(4)]
    assert [c.token_ids for c in both[:4]] == [c.token_ids for c in alone]
    assert [c.token_ids for c in alone] != [c.token_ids for c in later]
    assert len({c.token_ids for c in alone}) > 1


def test_training_reaches_the_generators(
    roles: ActorTeam, served_llama: str, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Two ZeRO-3 ranks train, gather and publish; the canary and plain transformers confirm what is served."""
    tokenizer = AutoTokenizer.from_pretrained(served_llama)
    texts = ("Rome, of course.", "The capital is Paris.")
    pair = tuple(
        Candidate(prompts[0].id, i, tuple(tokenizer(text)["input_ids"]), (), text, "stop", 0, 0)
        for i, text in enumerate(texts)
    )
    preferences = [Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0)) for prompt in prompts]
    ready = roles.trainers.with_reference(preferences, seed=0, rounds_done=0)
    steps = [step for _ in range(4) for step in roles.trainers.train(ready, seed=0)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    with pytest.raises(WeightSyncError, match="canary"):
        roles.publisher.verify()
    gaps = roles.publisher.publish(_Version.current + 1)
    _Version.current += 1
    assert gaps["logprob_gap_max"] < _LOGP_TOLERANCE
    path = tmp_path / "trained.safetensors"
    roles.trainers.save_weights(str(path))
    _assert_serves(roles, served_llama, load_file(path), prompts)
    folders = [path for path in roles.publisher.transport.folders.directory.iterdir() if path.is_dir()]  # type: ignore[attr-defined]
    assert folders == []
