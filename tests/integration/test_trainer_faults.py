"""Trainer ranks that die, hang or run out of memory in the middle of a round."""

import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from actors.supervision import trainers as trainer_supervision
from actors.supervision.incidents import Incidents
from actors.supervision.processes import kill, process_of
from actors.supervision.slot import Supervision
from actors.supervision.trainers import SupervisedTrainers, start_ranks
from actors.trainer.actor import TrainerSpec, free_address
from raylign.config.blocks import RecoveryBlock
from raylign.config.reference import ReferenceBlock, SamplerReferenceBlock
from raylign.errors import TrainerError
from raylign.records import Candidate, Preference
from raylign.run.checkpoints import Checkpoints, Metrics
from tests.faults import record
from tests.integration.ranks import preferences, spec_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long_fault,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("resources"),
]

PAIRS = preferences(12)
OPTIONS = {"ranks": 2, "zero_stage": 2, "per_device_train_batch_size": 1, "save_steps": 2, "step_timeout_s": 10}
FAULTS = {
    signal.SIGKILL: ("trainer rank killed in a step", "kill -9"),
    signal.SIGSTOP: ("trainer rank stopped in a step (deadline 10 s)", "SIGSTOP"),
}


@dataclass
class Round:
    """What a round in training writes to; `on_step` is called after each step."""

    folder: Path
    on_step: Callable[[int], None] = lambda number: None
    index: int = 1
    steps: dict[int, Metrics] = field(default_factory=dict)

    def step(self, number: int, metrics: Metrics) -> None:
        self.steps[number] = metrics
        self.on_step(number)

    def new_checkpoint(
        self, steps: Sequence[Metrics], complete: bool, needed_bytes: int
    ) -> AbstractContextManager[Path]:
        return Checkpoints(self.folder, None).new(self.index, steps, complete, needed_bytes)

    def save_bad_step(self, number: int, preferences: Sequence[Preference]) -> None:
        raise AssertionError(f"step {number} is not finite")


class Trainers:
    """A supervised group of two ranks and what became of it."""

    def __init__(self, spec: TrainerSpec, stacks: Path) -> None:
        self.entries: list[tuple[float, str, Mapping[str, Any]]] = []
        self.group = SupervisedTrainers(
            lambda: start_ranks(spec, [{"num_cpus": 0}] * spec.trainer.ranks),
            block=spec.trainer,
            loss=spec.loss,
            reference=spec.reference,
            adapter=True,
            supervision=Supervision(
                "trainer",
                TrainerError,
                Incidents(RecoveryBlock(), lambda role, happened, detail: self._put(happened, detail)),
                stacks,
            ),
        )
        self.group.restore(None)

    def _put(self, happened: str, detail: Mapping[str, Any]) -> None:
        self.entries.append((time.monotonic(), happened, detail))

    def train(self, round_: Round, pairs: Sequence[Preference] = PAIRS) -> list[Metrics]:
        ready = self.group.with_reference(pairs, seed=5, rounds_done=0)
        return self.group.train_round(ready, 5, round_, lambda finished: None)


def _trainers(model: str, stacks: Path, reference: ReferenceBlock | None = None) -> Trainers:
    spec = spec_of(model, {"lora": {"r": 4, "lora_alpha": 8}}, OPTIONS, reference=reference)
    return Trainers(replace(spec, stacks=str(stacks)), stacks)


@pytest.fixture(scope="module")
def expected(
    ranks_llama: str, resources: dict[str, float], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Metrics], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    trainers = _trainers(ranks_llama, folder / "stacks")
    steps = trainers.train(Round(folder / "checkpoints"))
    kill(trainers.group.handles)
    return steps, folder / "checkpoints/0001/adapter_model.safetensors"


@pytest.mark.parametrize("number", FAULTS)
def test_a_rank_is_lost_in_the_middle_of_a_round(
    number: signal.Signals, ranks_llama: str, expected: tuple[list[Metrics], Path], tmp_path: Path
) -> None:
    trainers, moments = _trainers(ranks_llama, tmp_path / "stacks"), list[float]()

    def hit(step: int) -> None:
        if step == 3 and not moments:
            moments.append(time.monotonic())
            os.kill(process_of(trainers.group.handles[1]).pid, number)

    record_of_round = Round(tmp_path / "checkpoints", hit)
    steps = trainers.train(record_of_round)
    kill(trainers.group.handles)
    (lost_at, lost, detail), (_, recovered, after) = trainers.entries
    assert (lost, recovered) == ("lost", "recovered")
    assert steps == expected[0]
    assert record_of_round.steps == dict(enumerate(expected[0], start=1))
    weights, wanted = load_file(tmp_path / "checkpoints/0001/adapter_model.safetensors"), load_file(expected[1])
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    if number == signal.SIGKILL:
        assert lost_at - moments[0] < 10
    else:
        assert "trainer-0" in detail["cause"] and "it is stopped" in detail["cause"]
        assert any("all_reduce" in path.read_text() for path in (tmp_path / "stacks").glob("trainer-0-*.txt"))
    record(
        "trainer rank killed in a step"
        if number == signal.SIGKILL
        else "trainer rank stopped in a step (deadline 10 s)",
        "kill -9" if number == signal.SIGKILL else "SIGSTOP",
        detected_s=lost_at - moments[0],
        recovered_s=after["seconds"],
        lost="nothing: goes on from the newest checkpoint, same steps and weights",
    )


def test_a_checkpoint_that_does_not_fit_the_disk(
    ranks_llama: str, expected: tuple[list[Metrics], Path], tmp_path: Path
) -> None:
    """The disk is full from step 3 on; the checkpoint of step 2 stays, and training goes on from it."""
    trainers = _trainers(ranks_llama, tmp_path / "stacks")
    ranks = [psutil.Process(process_of(handle).pid) for handle in trainers.group.handles]

    def fill(step: int) -> None:
        if step == 3:
            for rank in ranks:
                rank.rlimit(psutil.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    with pytest.raises(TrainerError, match=r"cannot be written: File too large; free some space"):
        trainers.train(Round(tmp_path / "checkpoints", fill))
    left = Checkpoints(tmp_path / "checkpoints", None).newest()
    assert left and (left.round, left.complete, len(left.steps)) == (1, False, 2)
    for rank in ranks:
        rank.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainers.group.restore(left)
    assert trainers.train(Round(tmp_path / "checkpoints")) == expected[0]
    kill(trainers.group.handles)
    record(
        "disk full at a checkpoint",
        "no file of the ranks may grow beyond 1,000 bytes",
        lost="nothing: the checkpoint before stays, the same command goes on from it",
    )


def _repeated(candidate: Candidate) -> Candidate:
    return replace(candidate, token_ids=candidate.token_ids * 300, logprobs=candidate.logprobs * 300)


def test_a_rank_without_memory(tiny_llama: str, tmp_path: Path) -> None:
    """With answers so long that what is free of the memory that a rank has mapped is not enough."""
    trainers = _trainers(tiny_llama, tmp_path / "stacks", SamplerReferenceBlock())
    long = [replace(pair, candidates=tuple(map(_repeated, pair.candidates))) for pair in PAIRS]
    for handle in trainers.group.handles:
        rank = psutil.Process(process_of(handle).pid)
        rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms + (1 << 20), resource.RLIM_INFINITY))
    with pytest.raises(TrainerError, match=r"ran out of memory .*; what would help: trainer\."):
        trainers.train(Round(tmp_path / "checkpoints"), long)
    kill(trainers.group.handles)
    record(
        "out of memory in a rank",
        "the process may map 1 MiB more",
        lost="nothing: stops, with what to lower",
    )


def test_a_port_that_somebody_took_is_tried_again(
    ranks_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "asked"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]

        def taken_at_first() -> tuple[str, int]:
            if mark.exists():
                return free_address()
            mark.touch()
            return "127.0.0.1", port

        monkeypatch.setattr(trainer_supervision, "free_address", taken_at_first)
        trainers = _trainers(ranks_llama, tmp_path / "stacks")
    kill(trainers.group.handles)
    assert mark.exists()
    record("port of the ranks in use", "another listener on it", lost="nothing: the next free one is taken")
