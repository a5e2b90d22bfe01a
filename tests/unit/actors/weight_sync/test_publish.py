"""The publish sequence, the canary and the transports, between fake trainers and fake engines."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import (
    IPC,
    NCCL,
    DeviceTransport,
    EngineEnd,
    LoraTransport,
    ShmTransport,
    WeightTransport,
)
from raylign.config import OnlineDpoConfig
from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import GeneratorError, WeightSyncError
from raylign.roles import DeviceLink, NodePath
from raylign.run.checkpoints import Checkpoint
from recipes.opening import serve_newest
from tests.fakes import WEIGHT, FakeEngine, FakeGenerators, FakeRank, fake_trainers
from tests.faults import record

IDS = ((3, 4, 5), (6, 7))


class Setting:
    """Trainers at version 1, engines at version 0, and what they did in order."""

    def __init__(self, transport: WeightTransport, engines: Sequence[type[FakeEngine]] = (FakeEngine, FakeEngine)):
        self.events: list[str] = []
        self.generators = FakeGenerators([engine(self.events) for engine in engines])
        self.rank = FakeRank(self.events, OnlineDpoConfig())
        self.rank.version = 1
        self.trainers = fake_trainers(self.rank, OnlineDpoConfig())
        self.publisher = WeightPublisher(self.trainers, self.generators, transport, Canary(IDS, 0.25), 1.0)

    def weights(self) -> list[int]:
        return [engine.weights for engine in self.generators.engines]


def shm(directory: Path, shape: tuple[int, ...] = (1,), needed: int = 1) -> ShmTransport:
    return ShmTransport(OneNode(directory), {WEIGHT: shape}, needed)


def gaps(published: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in published.items() if name.startswith("logprob_gap")}


def test_shared_memory_in_order(tmp_path: Path) -> None:
    setting = Setting(shm(tmp_path))
    published = setting.publisher.publish(1)
    assert gaps(published) == {"logprob_gap_mean": 0.0, "logprob_gap_max": 0.0}
    assert published["bytes"] > 8 and published["gb_per_s"] == published["bytes"] / 1e9 / published["seconds"]
    assert setting.events == ["save weights", "load weights", "load weights"]
    assert setting.weights() == [1, 1] and list(tmp_path.iterdir()) == []


def test_an_adapter_in_order(tmp_path: Path) -> None:
    setting = Setting(LoraTransport(OneNode(tmp_path)), engines=(FakeEngine,))
    setting.publisher.publish(1)
    assert setting.events == ["save adapter", "load adapter"]
    assert setting.weights() == [1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("four_bits", [True, False])
def test_only_a_base_in_4_bits_is_pushed_before_round_1(four_bits: bool, tmp_path: Path) -> None:
    """All others were loaded from the checkpoint that the generators serve."""
    setting = Setting(shm(tmp_path), engines=(FakeEngine,))
    setting.rank.version = 0
    found = serve_newest(setting.publisher, ModelBlock(lora=LoraBlock(), load_in_4bit=four_bits), None)
    assert gaps(found) == {"logprob_gap_mean": 0.0, "logprob_gap_max": 0.0}
    assert setting.events == (["save weights", "load weights"] if four_bits else [])


@pytest.mark.parametrize(("complete", "version"), [(False, 0), (True, 1)])
def test_what_a_checkpoint_holds_is_pushed(complete: bool, version: int, tmp_path: Path) -> None:
    """In the middle of round 1 the trainers are no version that was ever served."""
    setting = Setting(shm(tmp_path), engines=(FakeEngine,))
    found = serve_newest(setting.publisher, ModelBlock(lora=LoraBlock()), Checkpoint(tmp_path, 1, complete, ()))
    assert gaps(found) == {"logprob_gap_mean": 0.0, "logprob_gap_max": 0.0}
    assert setting.weights() == [1] and setting.generators.engines[0].label_now == version


@pytest.mark.parametrize("end", [NCCL, IPC])
def test_from_device_to_device_in_order(end: EngineEnd) -> None:
    link: DeviceLink = "nccl" if end is NCCL else "ipc"
    setting = Setting(DeviceTransport(end, link, workers=4, manifest={WEIGHT: (3, 5)}, bytes_per_weight=2))
    assert setting.publisher.publish(1)["bytes"] == 30
    assert setting.events == ["pause", "pause", f"{link} to 2 of 4", "resume", "resume"]
    assert [engine.label_now for engine in setting.generators.engines] == [1, 1] == setting.weights()


def test_weights_that_do_not_fit_reach_no_engine(tmp_path: Path) -> None:
    setting = Setting(shm(tmp_path, shape=(2,)))
    with pytest.raises(WeightSyncError, match=rf"nothing was changed: wrong shape: {WEIGHT} has shape \[1\]"):
        setting.publisher.publish(1)
    assert "load weights" not in setting.events and setting.weights() == [0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_without_room_nothing_is_written(tmp_path: Path) -> None:
    setting = Setting(shm(tmp_path, needed=shutil.disk_usage(tmp_path).total + 1))
    with pytest.raises(WeightSyncError, match="MB free, a weight push needs"):
        setting.publisher.publish(1)
    assert setting.events == []
    record("shared memory too small", "a push larger than the disk", lost="nothing: refused before anything is written")


class Broken(FakeEngine):
    """Fails in the middle of an update."""

    async def take_weights(self, file: NodePath, version: int) -> None:
        raise GeneratorError("the engine died")

    async def take_adapter(self, folder: NodePath, version: int) -> None:
        raise GeneratorError("the engine died")


@pytest.mark.parametrize("adapter", [True, False])
def test_a_failed_update_is_a_weight_sync_error_and_leaves_no_file(adapter: bool, tmp_path: Path) -> None:
    setting = Setting(LoraTransport(OneNode(tmp_path)) if adapter else shm(tmp_path), engines=(FakeEngine, Broken))
    with pytest.raises(WeightSyncError, match="publishing version 1 failed: the engine died"):
        setting.publisher.publish(1)
    assert list(tmp_path.iterdir()) == []


def test_who_is_lost_and_replaced_in_the_middle_of_a_push_gets_another(tmp_path: Path) -> None:
    """A push that fails without a loss is not tried again: `test_a_failed_update_...` has that."""
    setting = Setting(shm(tmp_path), engines=(FakeEngine, Broken))

    def replace_dead() -> None:
        engines = setting.generators.engines
        setting.generators.engines = setting.generators.handles = (engines[0], FakeEngine(setting.events))

    setting.generators.replace_dead = replace_dead  # type: ignore[method-assign]
    setting.publisher.publish(1)
    assert setting.events == ["save weights", "load weights"] * 2 + ["load weights"]
    assert setting.weights() == [1, 1] and list(tmp_path.iterdir()) == []


class Forgetful(FakeEngine):
    """Takes weights but not their label."""

    async def label(self, version: int) -> None:
        return


def test_an_engine_that_serves_another_version_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match=r"generators serve versions \[1, 0\] after version 1 was pushed"):
        Setting(shm(tmp_path), engines=(FakeEngine, Forgetful)).publisher.publish(1)


class Stale(FakeEngine):
    """Says it took the weights and keeps the old ones."""

    async def take_weights(self, file: NodePath, version: int) -> None:
        await self.label(version)


@pytest.mark.fault
def test_the_canary_finds_one_stale_engine_among_many(tmp_path: Path) -> None:
    """Version 0 gives -1 nats a token, version 1 gives -0.5: a gap of 0.5, though the mean over 4 engines is 0.125."""
    setting = Setting(shm(tmp_path), engines=(FakeEngine, FakeEngine, Stale, FakeEngine))
    with pytest.raises(WeightSyncError) as caught:
        setting.publisher.publish(1)
    assert "log-probs differ from the trainer's by 0.5000 nats a token, limit 0.25;" in str(caught.value)
    assert "generators.weight_sync.canary_max_gap" in str(caught.value)
    record("a generator serves other weights", "an engine that keeps the old ones", lost="nothing: round refused")


class Off(FakeEngine):
    """Differs by 0.01 on the first token and by 0.04 on every later one."""

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        exact = await super().token_logps(token_ids)
        return [exact[0] + 0.01, *[logp - 0.04 for logp in exact[1:]]]


def test_the_gaps_by_hand(tmp_path: Path) -> None:
    """Tokens (2 + 1) on two engines: 0, 0, 0 and 0.01, 0.04, 0.01."""
    found = gaps(Setting(shm(tmp_path), engines=(FakeEngine, Off)).publisher.publish(1))
    assert found == pytest.approx({"logprob_gap_mean": 0.06 / 6, "logprob_gap_max": 0.04})


def test_a_gap_at_the_limit_passes(tmp_path: Path) -> None:
    setting = Setting(shm(tmp_path), engines=(FakeEngine, Off))
    setting.publisher.publish(1)
    worst = (0.01 + 0.04) / 2
    Canary(IDS, worst + 1e-9).check(setting.trainers, setting.generators, 1.0)
    with pytest.raises(WeightSyncError, match="differ from the trainer's by 0.0250 nats"):
        Canary(IDS, worst - 1e-9).check(setting.trainers, setting.generators, 1.0)


class NotANumber(FakeEngine):
    """Gives NaN on prompts of two tokens."""

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        return await super().token_logps(token_ids) if len(token_ids) > 2 else [float("nan")]


def test_log_probs_that_are_no_numbers_are_refused_if_they_come_first(tmp_path: Path) -> None:
    setting = Setting(shm(tmp_path), engines=(NotANumber,))
    setting.rank.version = 0
    with pytest.raises(WeightSyncError):
        Canary(IDS[::-1], 0.25).check(setting.trainers, setting.generators, 1.0)


def test_log_probs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError):
        Setting(shm(tmp_path), engines=(FakeEngine, NotANumber)).publisher.publish(1)
