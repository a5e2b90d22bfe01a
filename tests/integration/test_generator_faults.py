"""Generators that die, lose their engine or go silent: replaced, brought up to date, and no candidate is another."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from actors.placement import plan_team
from actors.supervision.incidents import Incidents
from actors.supervision.processes import process_of
from actors.team import ActorTeam, team
from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.blocks import RecoveryBlock
from raylign.errors import GeneratorError
from raylign.records import Candidate, Preference, Prompt
from raylign.sampling.decoding import Decoding
from tests.faults import record
from tests.integration.tiny import wait_until
from tests.processes import descendants, engine_core

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DECODING = Decoding(num_generations=4, max_new_tokens=160, temperature=1.0, top_p=1.0, top_k=0)
LOST = "nothing: same candidates"
MOST_RESTARTS = 9


def _config(folder: Path) -> OnlineDpoConfig:
    return parse_config(
        {
            "run": {"dir": str(folder), "name": "faults"},
            "model": {"dtype": "float32"},
            "trainer": {"per_device_train_batch_size": 1, "learning_rate": 1e-3},
            "generators": {
                "count": 2,
                "max_model_len": 512,
                "max_num_seqs": 8,
                "kv_cache_gb": 0.1,
                "request_timeout_s": 30,
            },
            "placement": {"generator_cpus": 1, "trainer_cpus": 1},
        }
    )


@dataclass
class Seen:
    """Incidents as they come, with the moment of each."""

    entries: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def record(self, role: str, happened: str, detail: Any) -> None:
        self.entries.append((time.monotonic(), happened, dict(detail)))

    def since(self, moment: float) -> list[tuple[float, str, dict[str, Any]]]:
        return [entry for entry in self.entries if entry[0] >= moment]


@dataclass(frozen=True)
class Stage:
    """Two generators that serve trained weights, the prompts they are asked, and what they answer undisturbed."""

    roles: ActorTeam
    prompts: Sequence[Prompt]
    seen: Seen
    expected: Sequence[Candidate]
    stacks: Path
    version: int = 1

    def process(self, slot: int) -> psutil.Process:
        return psutil.Process(process_of(self.roles.generators.handles[slot]).pid)

    def engine(self, slot: int) -> psutil.Process:
        return engine_core(self.process(slot))

    def sample(self, on_first: Callable[[], None] = lambda: None) -> list[Candidate]:
        """Calls `on_first` once the first prompt is finished."""
        finished = 0

        def count(candidates: Sequence[Candidate]) -> None:
            nonlocal finished
            finished += 1
            if finished == 1:
                on_first()

        return self.roles.generators.sample(
            self.prompts,
            DECODING,
            seed=3,
            round_index=1,
            version=self.version,
            advance=lambda n: None,
            on_finished=count,
        )


def film_prompts(folder: str) -> list[Prompt]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chats = [({"role": "user", "content": f"Write about film number {index}."},) for index in range(12)]
    encode = tokenizer.apply_chat_template
    ids = [tuple(encode(list(chat), add_generation_prompt=True, return_dict=False)) for chat in chats]
    return [Prompt(f"p{i}", chat, tokens) for i, (chat, tokens) in enumerate(zip(chats, ids, strict=True))]


@pytest.fixture(scope="module")
def stage(served_llama: str, resources: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    prompts, seen, folder = film_prompts(served_llama), Seen(), tmp_path_factory.mktemp("runs")
    config = _config(folder)
    with team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=tuple(prompt.token_ids for prompt in prompts[:2]),
        plan=plan_team(config, resources),
        incidents=Incidents(RecoveryBlock(max_restarts=MOST_RESTARTS), seen.record),
    ) as roles:
        pair = tuple(Candidate("p0", i, (100 + i, 200 + i), (), "", "stop", 0, 0) for i in range(2))
        two = [Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0)) for prompt in prompts[:2]]
        list(roles.trainers.train(roles.trainers.with_reference(two, seed=0, rounds_done=0), seed=0))
        roles.publisher.publish(1)
        made = Stage(roles, prompts, seen, [], folder / "faults/stacks")
        yield Stage(roles, prompts, seen, made.sample(), folder / "faults/stacks")


def _assert_recovered(stage: Stage, moment: float, found: Sequence[Candidate]) -> tuple[float, float, str]:
    """Seconds until it was noticed and until the replacement worked, and the cause."""
    stage.roles.generators.settle()
    assert [c.token_ids for c in found] == [c.token_ids for c in stage.expected]
    lost, recovered = stage.seen.since(moment)
    assert (lost[1], recovered[1]) == ("lost", "recovered")
    # The replacement serves the pushed version, as the canary said, and samples the same.
    assert [c.token_ids for c in stage.sample()] == [c.token_ids for c in stage.expected]
    return lost[0] - moment, recovered[2]["seconds"], lost[2]["cause"]


def _struck(stage: Stage, victim: psutil.Process, number: signal.Signals) -> tuple[float, float, str]:
    """Signal `victim` once the first prompt is finished; as `_assert_recovered`."""
    moments: list[float] = []

    def strike() -> None:
        moments.append(time.monotonic())
        os.kill(victim.pid, number)

    found = stage.sample(strike)
    return _assert_recovered(stage, moments[0], found)


@pytest.mark.long_fault
@pytest.mark.parametrize("part", ["actor", "engine core"])
def test_one_is_killed_while_it_samples(part: str, stage: Stage) -> None:
    victim = stage.process(1) if part == "actor" else stage.engine(0)
    detected, recovered, _ = _struck(stage, victim, signal.SIGKILL)
    assert detected < 10
    record(
        f"generator's {part} killed while it samples",
        "kill -9",
        detected_s=detected,
        recovered_s=recovered,
        lost=LOST,
    )


@pytest.mark.long_fault
@pytest.mark.parametrize("part", ["actor", "engine core"])
def test_one_goes_silent_while_it_samples(part: str, stage: Stage) -> None:
    victim = stage.process(0) if part == "actor" else stage.engine(1)
    detected, recovered, cause = _struck(stage, victim, signal.SIGSTOP)
    assert "no prompt finished within 30 s (generators.request_timeout_s)" in cause
    if part == "actor":
        assert "it is stopped" in cause
    else:
        assert "its stacks are in" in cause
        assert any("most recent call first" in path.read_text() for path in stage.stacks.glob("generator-1-*.txt"))
    record(
        f"generator's {part} stopped while it samples (deadline 30 s)",
        "SIGSTOP",
        detected_s=detected,
        recovered_s=recovered,
        lost=f"{LOST}; the stacks are in the run directory" if part != "actor" else LOST,
    )


@pytest.mark.long_fault
def test_one_is_killed_before_a_publish(stage: Stage) -> None:
    """The next publish finds it dead; the other one gets its weights, and so does the replacement."""
    moment = time.monotonic()
    os.kill(stage.process(0).pid, signal.SIGKILL)
    stage.roles.publisher.publish(1)
    detected, recovered, _ = _assert_recovered(stage, moment, stage.sample())
    assert detected < 10
    record(
        "generator killed at a publish",
        "kill -9",
        detected_s=detected,
        recovered_s=recovered,
        lost="nothing: the other keeps its engine, the replacement gets the version and passes the canary",
    )


@pytest.mark.long_fault
def test_actors_that_nobody_uses_are_missed(stage: Stage) -> None:
    """A generator, the trainer and the scorer, all idle."""
    stage.roles.generators.settle()
    moment = time.monotonic()
    (scorer,) = [process for process, line in descendants().items() if line.startswith("ray::ScorerProcess")]
    trainer = process_of(stage.roles.trainers.handles[0]).pid
    for pid in (stage.process(1).pid, trainer, scorer.pid):
        os.kill(pid, signal.SIGKILL)

    def entries(happened: str) -> dict[str, tuple[float, dict[str, Any]]]:
        return {e[2]["actor"]: (e[0] - moment, e[2]) for e in stage.seen.since(moment) if e[1] == happened}

    wait_until(lambda: len(entries("lost")) == 3, 20, lambda: f"three losses in {entries('lost')}")
    detected = max(seconds for seconds, _ in entries("lost").values())
    assert detected < 10
    stage.roles.generators.settle()
    assert stage.roles.trainers.token_logps([(1, 2, 3)])
    wait_until(lambda: len(entries("recovered")) == 3, 120, lambda: f"three recoveries in {entries('recovered')}")
    record(
        "generator, trainer and scorer killed while idle",
        "kill -9",
        detected_s=detected,
        recovered_s=max(detail["seconds"] for _, detail in entries("recovered").values()),
        lost="nothing",
    )


@pytest.mark.long_fault
def test_past_the_cap_the_run_stops(stage: Stage) -> None:
    """Both die again and again."""

    def kill_all() -> None:
        for slot in range(2):
            os.kill(process_of(stage.roles.generators.handles[slot]).pid, signal.SIGKILL)

    with pytest.raises(GeneratorError, match=rf"recovery\.max_restarts={MOST_RESTARTS}; everything finished is saved"):
        while True:
            stage.sample(kill_all)
    record("actors die again and again", "kill -9 past recovery.max_restarts", lost="nothing: stops, all stages saved")


@pytest.mark.long_fault
def test_a_worker_of_the_only_generator_is_killed(
    served_llama: str, resources: dict[str, float], tmp_path: Path
) -> None:
    """Two workers hold half of the model each; without one the engine is of no use."""
    seen, prompts = Seen(), film_prompts(served_llama)[:4]
    config = parse_config(
        {
            "run": {"dir": str(tmp_path), "name": "workers"},
            "model": {"dtype": "float32"},
            "generators": {"count": 1, "tensor_parallel_size": 2, "max_model_len": 512, "max_num_seqs": 8}
            | {"kv_cache_gb": 0.1},
            "placement": {"mode": "disaggregated", "generator_cpus": 1, "trainer_cpus": 1},
        }
    )
    with team(
        config,
        folder=served_llama,
        pad_id=2,
        canary_ids=(prompts[0].token_ids,),
        plan=plan_team(config, resources),
        incidents=Incidents(RecoveryBlock(), seen.record),
    ) as roles:
        two = Stage(roles, prompts, seen, [], tmp_path / "workers/stacks", version=0)
        expected = two.sample()
        lines = descendants(two.process(0))
        workers = [process for process, line in lines.items() if "Worker" in line]
        assert len(workers) == 2, lines
        detected, recovered, _ = _struck(replace(two, expected=expected), workers[1], signal.SIGKILL)
    assert detected < 10
    record(
        "generator's worker killed while it samples", "kill -9", detected_s=detected, recovered_s=recovered, lost=LOST
    )
