"""Bundles and places worked out by hand, and what a cluster that is too small is told."""

import socket
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from actors.placement import (
    OUTSIDE,
    ActorPlace,
    PlacementPlan,
    choose_device,
    plan_placement,
    require_resources,
)
from actors.supervision import trainers
from actors.trainer.actor import free_address
from raylign.config.blocks import GeneratorsBlock, PlacementBlock, TrainerBlock
from raylign.errors import PlacementError

Device = Literal["cpu", "gpu"]
Mode = Literal["colocated", "disaggregated"]


def plan(
    device: Device,
    mode: Mode,
    *,
    generators: int = 1,
    width: int = 1,
    ranks: int = 1,
    cpus: int = 2,
    rank_cpus: int = 0,
) -> PlacementPlan:
    return plan_placement(
        PlacementBlock(mode=mode, generator_cpus=cpus, trainer_cpus=rank_cpus or cpus),
        GeneratorsBlock(count=generators, tensor_parallel_size=width),
        TrainerBlock(ranks=ranks),
        device,
    )


def test_colocated_on_cpu_shares_one_bundle() -> None:
    place = ActorPlace(0, 1.0, 0.0)
    assert plan("cpu", "colocated") == PlacementPlan("cpu", ({"CPU": 2.0},), (place,), (place,))


def test_colocated_on_gpu_takes_half_of_it_each() -> None:
    place = ActorPlace(0, 1.0, 0.5)
    assert plan("gpu", "colocated") == PlacementPlan("gpu", ({"CPU": 2.0, "GPU": 1.0},), (place,), (place,))


def test_disaggregated_on_gpu_gives_each_its_own() -> None:
    bundle = {"CPU": 3.0, "GPU": 1.0}
    assert plan("gpu", "disaggregated", generators=2, ranks=3, cpus=3) == PlacementPlan(
        "gpu",
        (bundle,) * 5,
        (ActorPlace(0, 3.0, 1.0), ActorPlace(1, 3.0, 1.0)),
        (ActorPlace(2, 3.0, 1.0), ActorPlace(3, 3.0, 1.0), ActorPlace(4, 3.0, 1.0)),
    )


def test_disaggregated_on_cpu_reserves_no_gpu() -> None:
    made = plan("cpu", "disaggregated", ranks=2)
    assert made.bundles == ({"CPU": 2.0},) * 3 and made.required() == {"CPU": 6.0, "GPU": 0.0}


def test_tensor_parallel_generators_have_as_many_gpus_as_workers() -> None:
    made = plan("gpu", "disaggregated", generators=2, width=4, ranks=1)
    assert made.bundles == ({"CPU": 2.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 1.0})
    assert made.generators == (ActorPlace(0, 2.0, 4.0), ActorPlace(1, 2.0, 4.0))
    assert made.trainers == (ActorPlace(2, 2.0, 1.0),)


def test_more_ranks_than_generators_get_bundles_of_their_own() -> None:
    made = plan("gpu", "colocated", generators=2, ranks=4)
    assert made.bundles == ({"CPU": 2.0, "GPU": 1.0},) * 4
    assert [place.bundle for place in made.generators] == [0, 1]
    assert [place.bundle for place in made.trainers] == [0, 1, 2, 3]
    assert {place.num_gpus for place in (*made.generators, *made.trainers)} == {0.5}


def test_fewer_ranks_than_generators_share_the_first_bundles() -> None:
    made = plan("cpu", "colocated", generators=3, ranks=2)
    assert made.bundles == ({"CPU": 2.0},) * 3
    assert [place.bundle for place in made.trainers] == [0, 1]


def test_ranks_of_fewer_cores_share_a_generators_bundle_on_cpus() -> None:
    """Two generators of 4 cores and five ranks of 2: two ranks beside each generator, the fifth alone."""
    made = plan("cpu", "colocated", generators=2, ranks=5, cpus=4, rank_cpus=2)
    assert made.bundles == ({"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 2.0})
    assert made.generators == (ActorPlace(0, 2.0, 0.0), ActorPlace(1, 2.0, 0.0))
    assert made.trainers == (*[ActorPlace(0, 1.0, 0.0)] * 2, *[ActorPlace(1, 1.0, 0.0)] * 2, ActorPlace(2, 1.0, 0.0))
    assert [place.bundle for place in plan("gpu", "colocated", ranks=2, cpus=4, rank_cpus=1).trainers] == [0, 1]
    assert plan("cpu", "colocated", cpus=1, rank_cpus=3).bundles == ({"CPU": 3.0},)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
@pytest.mark.parametrize("generators", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("rank_cpus", [1, 2, 3])
def test_no_bundle_is_promised_twice(
    device: Device, mode: Mode, generators: int, width: int, ranks: int, rank_cpus: int
) -> None:
    if width > 1 and mode == "colocated":
        pytest.skip("refused by the config")
    made = plan(device, mode, generators=generators, width=width, ranks=ranks, rank_cpus=rank_cpus)
    assert (len(made.generators), len(made.trainers)) == (generators, ranks)
    cpus: defaultdict[int, float] = defaultdict(float)
    gpus: defaultdict[int, float] = defaultdict(float)
    for place in (*made.generators, *made.trainers):
        cpus[place.bundle] += place.num_cpus
        gpus[place.bundle] += place.num_gpus
    assert set(cpus) == set(range(len(made.bundles)))
    for index, bundle in enumerate(made.bundles):
        assert 0 < cpus[index] <= bundle["CPU"] and gpus[index] <= bundle.get("GPU", 0.0)


@pytest.mark.parametrize(
    ("named", "available", "device"),
    [
        ("auto", {"CPU": 8.0}, "cpu"),
        ("auto", {"CPU": 8.0, "GPU": 0.0}, "cpu"),
        ("auto", {"CPU": 8.0, "GPU": 1.0}, "gpu"),
        ("cpu", {"GPU": 4.0}, "cpu"),
        ("gpu", {"CPU": 8.0}, "gpu"),
    ],
)
def test_auto_takes_gpus_where_there_are_any(
    named: Literal["auto", "cpu", "gpu"], available: dict[str, float], device: Device
) -> None:
    assert choose_device(PlacementBlock(device=named), available) == device


def test_a_small_cluster_is_told_what_is_required_and_available() -> None:
    made = plan("gpu", "disaggregated", generators=2, ranks=2)
    with pytest.raises(PlacementError) as caught:
        require_resources(made, {"CPU": 6.0, "memory": 1e9})
    assert str(caught.value) == (
        "the cluster is too small: the roles need 8 CPU (available 6), 4 GPU (available 0); lower "
        "placement.generator_cpus, placement.trainer_cpus, trainer.ranks or generators.count, or set "
        "placement.mode=colocated"
    )


def test_only_what_is_short_is_named() -> None:
    with pytest.raises(PlacementError, match=r"the roles need 2 GPU \(available 1\); lower"):
        require_resources(plan("gpu", "disaggregated"), {"CPU": 64.0, "GPU": 1.0})


def test_a_cluster_of_exactly_the_size_passes() -> None:
    require_resources(plan("gpu", "disaggregated", generators=2, ranks=2), {"CPU": 8.0, "GPU": 4.0})
    require_resources(plan("cpu", "colocated"), {"CPU": 2.0})


def test_a_free_address_can_be_listened_on() -> None:
    address, port = free_address()
    with socket.socket() as server:
        server.bind((address, port))
        server.listen()


@pytest.mark.parametrize("alive", [1, 2])
def test_a_process_looks_for_a_free_address_only_where_it_could_be_another_nodes(
    alive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def get_all(calls: list[Any], *_: object) -> list[tuple[str, int]]:
        started.extend(calls)
        return [("10.0.0.2", 7)]

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * alive + [{"Alive": False}])
    monkeypatch.setattr(trainers, "get_all", get_all)
    monkeypatch.setattr("ray.remote", lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=str)))
    address, _ = trainers._meeting_place({}, 1.0)
    assert (address == "10.0.0.2") == (alive == 2) and len(started) == alive - 1


def with_scorer(device: Device, mode: Mode, gpus: float, cpus: float = 0.0) -> PlacementPlan:
    block = PlacementBlock(mode=mode, generator_cpus=2, trainer_cpus=2, scorer_cpus=cpus, scorer_gpus=gpus)
    return plan_placement(block, GeneratorsBlock(count=2), TrainerBlock(ranks=2), device)


def test_a_scorer_with_a_share_of_a_gpu_joins_the_first_colocated_bundle() -> None:
    made = with_scorer("gpu", "colocated", 0.25, cpus=1.0)
    assert made.bundles == ({"CPU": 3.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0})
    assert made.scorer == ActorPlace(0, 1.0, 0.25)
    assert made.generators == (ActorPlace(0, 1.0, 0.375), ActorPlace(1, 1.0, 0.5))
    assert made.trainers == (ActorPlace(0, 1.0, 0.375), ActorPlace(1, 1.0, 0.5))
    assert made.required() == {"CPU": 5.0, "GPU": 2.0}


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.33335, 0.9, 0.9999])
def test_shares_of_one_gpu_never_exceed_it_as_ray_counts(share: float) -> None:
    made = with_scorer("gpu", "colocated", share)
    shares = [made.generators[0].num_gpus, made.trainers[0].num_gpus, made.scorer.num_gpus]
    assert sum(round(amount * 10_000) for amount in shares) <= 10_000


@pytest.mark.parametrize(
    ("device", "mode", "gpus"),
    [("gpu", "colocated", 1.0), ("gpu", "disaggregated", 0.5), ("cpu", "colocated", 0.5), ("cpu", "colocated", 0.0)],
)
def test_elsewhere_the_scorer_is_outside_of_the_bundles(device: Device, mode: Mode, gpus: float) -> None:
    made, without = with_scorer(device, mode, gpus, cpus=1.5), with_scorer(device, mode, 0.0)
    assert made.bundles == without.bundles and made.generators == without.generators
    assert made.scorer == ActorPlace(OUTSIDE, 1.5, gpus)
    needed = without.required()
    assert made.required() == {"CPU": needed["CPU"] + 1.5, "GPU": needed["GPU"] + gpus}


def test_a_scorer_that_wants_a_gpu_where_there_is_none_is_named() -> None:
    with pytest.raises(PlacementError, match=r"0\.5 GPU \(available 0\).*; placement\.scorer_gpus too"):
        require_resources(with_scorer("cpu", "colocated", 0.5), {"CPU": 64.0})


def test_more_than_one_gpu_is_a_whole_number_of_them() -> None:
    with pytest.raises(ValidationError, match=r"1\.5 is neither a share of one GPU nor a whole number of them; take 1"):
        PlacementBlock(scorer_gpus=1.5)
