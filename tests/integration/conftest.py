"""One Ray cluster for the integration tests of a process, and small models to run on it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from ray.actor import ActorHandle

from actors import team
from actors.cluster import cluster
from actors.supervision.processes import kill
from raylign.models import resolve_model
from tests.integration.engines import Engines
from tests.integration.ranks import Processes
from tests.integration.tiny import random_llama


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the embedded SmolLM2-135M-Instruct."""
    return resolve_model("embedded:smollm2-135m")


@pytest.fixture(scope="session")
def ranks_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 2-layer Llama with tied embeddings for token ids of tests: no tokenizer, and so a small head."""
    return random_llama(tmp_path_factory.mktemp("ranks-llama"), "", vocabulary=4096, width=32, spread=0.2)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """The same with SmolLM2's tokenizer and as many rows."""
    return random_llama(tmp_path_factory.mktemp("tiny-llama"), smollm2, vocabulary=49152, width=32, spread=0.2)


@pytest.fixture(scope="session")
def served_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """The same with heads as wide as vLLM asks."""
    return random_llama(tmp_path_factory.mktemp("served-llama"), smollm2, vocabulary=49152, width=128, spread=0.1)


class Shared:
    """What the tests of one process share: a private Ray cluster, and processes in it for trainer ranks and an engine.

    Each is started when it is first asked for.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._resources: dict[str, float] = {}
        self._ranks, self._engines = Processes(), Engines()

    def resources(self) -> dict[str, float]:
        """The cluster's; four logical CPUs whatever the machine has."""
        if not self._resources:
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("RAY_ADDRESS", raising=False)
                self._resources = dict(self._open.enter_context(cluster(num_cpus=4)))
        return dict(self._resources)

    def ranks(self) -> Processes:
        self.resources()
        self._ranks.start(1, 2)
        return self._ranks

    def engines(self) -> Engines:
        self.resources()
        return self._engines

    def lend(self, patch: pytest.MonkeyPatch) -> None:
        """From now on `actors.team.team` takes the shared processes instead of new ones, and leaves them behind."""
        ranks, engines = self.ranks(), self.engines()

        def spare(handles: Sequence[ActorHandle[Any]]) -> None:
            kill([handle for handle in engines.give_back(handles) if not ranks.owns(handle)])

        patch.setattr(team, "GeneratorActor", engines)
        patch.setattr(team, "start_ranks", ranks.start_ranks)
        patch.setattr(team, "kill", spare)

    def end_engine(self) -> None:
        """End the process of engines, whose janitors keep looking at it."""
        self._engines.end()

    def stop(self) -> None:
        self._open.close()
        self._resources, self._ranks, self._engines = {}, Processes(), Engines()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def resources(shared: Shared) -> dict[str, float]:
    """A private Ray cluster that other test modules use too."""
    return shared.resources()


@pytest.fixture(scope="module")
def ranks(shared: Shared) -> Processes:
    """Groups of trainer ranks that other test modules use too; those with engines are over."""
    shared.end_engine()
    return shared.ranks()


@pytest.fixture(scope="module")
def lent(shared: Shared) -> Iterator[dict[str, float]]:
    """`resources`, for a module whose `actors.team.team` is made of processes that other test modules use too."""
    with pytest.MonkeyPatch.context() as patch:
        shared.lend(patch)
        yield shared.resources()


@pytest.fixture(scope="module")
def engines(shared: Shared) -> Engines:
    """Starts a generator at a time, in a process that other test modules use too."""
    return shared.engines()


@pytest.fixture(scope="module")
def no_cluster(shared: Shared) -> None:
    """This process is in no Ray cluster: the module starts its own."""
    shared.stop()
