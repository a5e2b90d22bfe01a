"""Generators and trainers that share a GPU, on one with a ledger: whole rounds, and never more held than there is."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from actors.supervision.turns import Held, SharedDevices
from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import IPC, DeviceTransport, LoraTransport, ShmTransport, WeightTransport
from raylign.config import OnlineDpoConfig, parse_config
from raylign.errors import GeneratorError
from raylign.records import Candidate, Completions, Preference, Prompt, TokenLogps
from raylign.roles import DeviceLink, Generator, NodePath, TrainerRank
from raylign.run.checkpoints import Metrics
from raylign.run.directory import continue_or_create
from raylign.sampling.decoding import Decoding
from raylign.tracking.journal import JOURNAL_NAME, Journal
from raylign.tracking.tracker import Tracker
from recipes.online_dpo import run_round
from recipes.run import Run
from tests.fakes import (
    WEIGHT,
    FakeEngine,
    FakeGenerators,
    FakeRank,
    FakeScorer,
    FakeTeam,
    NoFeed,
    fake_trainers,
)

GPU = 80.0
ENGINE: Mapping[str, float] = {"context": 1.0, "weights": 14.0, "kv_cache": 50.0}
RANK: Mapping[str, float] = {"context": 1.0, "weights": 14.0, "states": 45.0, "activations": 5.0}
"""GiB. Not both at once: 65 and 65, and 80 are there."""


@dataclass
class Ledger:
    """What lies on the GPU, by owner and part; taking more than there is fails as CUDA does."""

    held: dict[tuple[str, str], float] = field(default_factory=dict)
    highest: float = 0.0

    def take(self, owner: str, part: str, amount: float) -> None:
        self.held[owner, part] = amount
        self.highest = max(self.highest, sum(self.held.values()))
        assert sum(self.held.values()) <= GPU, f"out of memory: {self.held}"

    def leave(self, owner: str, part: str) -> None:
        self.held.pop((owner, part), None)

    def require(self, owner: str, *parts: str) -> None:
        missing = [part for part in parts if (owner, part) not in self.held]
        assert not missing, f"{owner} works without {missing}: {self.held}"


class LedgerEngine(FakeEngine):
    """Takes all when it starts; computes only with what is there."""

    def __init__(self, events: list[str], ledger: Ledger) -> None:
        super().__init__(events)
        self._ledger, self.emptied = ledger, False
        for part, amount in ENGINE.items():
            ledger.take("engine", part, amount)

    async def sleep(self, level: Literal[1, 2]) -> None:
        self._events.append(f"sleep {level}")
        self.emptied = self.emptied or level == 2
        for part in ("weights", "kv_cache"):
            self._ledger.leave("engine", part)

    async def wake_up(self, tags: Sequence[str]) -> None:
        self._events.append(f"wake {' '.join(tags)}")
        for tag in tags:
            self._ledger.take("engine", tag, ENGINE[tag])

    async def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
        self._ledger.require("engine", "weights", "kv_cache")
        assert not self.emptied, "it samples without weights"
        return await super().sample(prompt, decoding, seed, version)

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        self._ledger.require("engine", "weights", "kv_cache")
        assert not self.emptied
        return await super().token_logps(token_ids)

    async def take_weights(self, file: NodePath, version: int) -> None:
        self._ledger.require("engine", "weights")
        self.emptied = False
        await super().take_weights(file, version)

    async def take_adapter(self, folder: NodePath, version: int) -> None:
        self._ledger.require("engine", "weights")
        assert not self.emptied, "an adapter on a base that is gone"
        await super().take_adapter(folder, version)


class LedgerRank(FakeRank):
    """Takes all when it starts; a step needs room for activations as well."""

    def __init__(self, events: list[str], config: OnlineDpoConfig, ledger: Ledger) -> None:
        super().__init__(events, config)
        self._ledger = ledger
        self.start()

    def start(self) -> None:
        for part in ("context", "weights", "states"):
            self._ledger.take("rank", part, RANK[part])

    def offload(self, *, keep_weights: bool) -> None:
        self._events.append(f"offload{' but weights' if keep_weights else ''}")
        for part in ("states",) if keep_weights else ("states", "weights"):
            self._ledger.leave("rank", part)

    def reload(self, *, weights_alone: bool) -> None:
        self._events.append(f"reload{' weights' if weights_alone else ''}")
        for part in ("weights",) if weights_alone else ("weights", "states"):
            self._ledger.take("rank", part, RANK[part])

    def _compute(self, *parts: str) -> None:
        self._ledger.require("rank", *parts)
        self._ledger.take("rank", "activations", RANK["activations"])
        self._ledger.leave("rank", "activations")

    def train_step(self) -> Metrics:
        self._compute("weights", "states")
        return super().train_step()

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        self._compute("weights")
        return super().initial_logprobs(rows)

    def reference_candidates(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> dict[int, Any]:
        self._compute("weights")
        return super().reference_candidates(preferences, seed, rounds_done)

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        self._ledger.require("rank", "weights")
        return super().token_logps(token_ids)

    def save_weights(self, path: str) -> None:
        self._ledger.require("rank", "weights")
        super().save_weights(path)

    def send_weights(
        self, link: DeviceLink, handles: Sequence[Any], address: str, port: int, workers: int, timeout_s: float
    ) -> None:
        self._ledger.require("rank", "weights")
        self._ledger.require("engine", "weights")
        super().send_weights(link, handles, address, port, workers, timeout_s)
        for engine in handles:
            engine.emptied = False


class Shared:
    """A team on one GPU, started as `actors.team` starts it."""

    def __init__(self, folder: Path, transport: WeightTransport, *, lora: bool = False) -> None:
        overrides = [f"run.dir={folder}/runs", "schedule.rounds=3"]
        overrides += ["model.lora={r: 8}"] if lora else ["model.lora=null"]
        self.config = parse_config({"trainer": {"per_device_train_batch_size": 1}}, overrides)
        self.events: list[str] = []
        self.ledger = Ledger()
        self.turns = SharedDevices(replaces=transport.engine.backend is not None)
        self.engine = LedgerEngine(self.events, self.ledger)
        self.generators = FakeGenerators([self.engine], self.turns)
        self.turns.engines_started(self.generators)
        self.turns.trainers_start()
        self.rank = LedgerRank(self.events, self.config, self.ledger)
        self.trainers = fake_trainers(self.rank, self.config, self.turns)
        self.turns.movers = self.trainers
        canary = Canary(((1, 2, 3),), 0.25)
        self.publisher = WeightPublisher(self.trainers, self.generators, transport, canary, 1.0, self.turns)
        self.team = FakeTeam(
            self.generators, self.trainers, FakeScorer(self.events, self.config.scoring), self.publisher
        )
        directory = continue_or_create(self.config)
        self.journal = Journal(directory.path / JOURNAL_NAME)
        console = Console(file=io.StringIO())
        self.run = Run(self.config, directory, Tracker(self.journal, NoFeed()), console)

    def round(self, index: int) -> None:
        train, held_out = [Prompt("a", (), (1,)), Prompt("b", (), (2,))], [Prompt("x", (), (3,))]
        run_round(self.run.round_log(index), train, held_out, self.team, self.config)


TRANSPORTS = ("shm", "ipc", "lora")


@pytest.fixture
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    found: dict[str, WeightTransport] = {
        "shm": ShmTransport(OneNode(tmp_path), {WEIGHT: (1,)}, 1),
        "ipc": DeviceTransport(IPC, "ipc", 1, {WEIGHT: (1,)}, 1),
        "lora": LoraTransport(OneNode(tmp_path)),
    }
    made = Shared(tmp_path, found[request.param], lora=request.param == "lora")
    yield made
    made.journal.close()


@pytest.mark.parametrize("scorer", [0.0, 14.0], ids=["alone", "beside a scorer"])
@pytest.mark.parametrize("shared", TRANSPORTS, indirect=True)
def test_three_rounds_fit_where_both_at_once_would_not(shared: Shared, scorer: float) -> None:
    """A scorer that shares the GPU never leaves it: the others have the rest."""
    assert sum(ENGINE.values()) + sum(RANK.values()) > GPU
    shared.ledger.take("scorer", "model", scorer)
    shared.publisher.verify()
    for index in (1, 2, 3):
        shared.round(index)
        assert shared.engine.weights == index
    assert shared.ledger.highest == 66 + scorer <= GPU


@pytest.mark.parametrize("shared", ["shm"], indirect=True)
def test_a_round_with_all_weights_in_order(shared: Shared) -> None:
    shared.publisher.verify()
    shared.events.clear()
    shared.round(1)
    moves = [event for event in shared.events if event.split()[0] in ("sleep", "wake", "offload", "reload", "load")]
    assert moves == [
        *["sleep 2", "reload"],  # reference and training
        *["offload but weights", "wake weights", "load weights"],  # publish
        *["offload", "wake kv_cache"],  # the canary, then the held-out prompts
        *["sleep 1", "reload"],  # their log-probs under the reference
    ]


@pytest.mark.parametrize("shared", ["lora"], indirect=True)
def test_the_base_under_an_adapter_is_kept(shared: Shared) -> None:
    shared.publisher.verify()
    shared.round(1)
    assert "sleep 2" not in shared.events and "sleep 1" in shared.events


@pytest.mark.parametrize("shared", ["ipc"], indirect=True)
def test_engines_that_slept_without_weights_sample_nothing_before_a_publish(shared: Shared) -> None:
    shared.publisher.verify()
    shared.trainers.once(TrainerRank.begin_round, (), 0, 0, ())
    with pytest.raises(GeneratorError, match="goes on from the newest checkpoint"):
        shared.generators.call("sampling", 1.0, Generator.token_logps, (1, 2))
    shared.publisher.publish(0)
    shared.generators.call("sampling", 1.0, Generator.token_logps, (1, 2))


@pytest.mark.parametrize("shared", ["shm"], indirect=True)
def test_ranks_that_are_lost_and_started_again_find_room(shared: Shared) -> None:
    """While engines sample, whoever starts anew comes only after they have left."""
    shared.publisher.verify()
    assert shared.ledger.held["engine", "kv_cache"]
    shared.turns.trainers_start()
    shared.rank.start()
    shared.round(1)
    assert shared.engine.weights == 1


@pytest.mark.parametrize(
    ("engines", "does"), [("all", (None, ())), ("weights", (1, ("weights",))), ("nothing", (1, ()))]
)
def test_an_engine_that_joins_holds_what_the_others_hold(engines: Held, does: tuple[int | None, Sequence[str]]) -> None:
    turns = SharedDevices(replaces=True)
    turns._engines = engines
    assert turns.engine_joins() == does
