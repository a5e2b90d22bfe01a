"""One Ray cluster for the integration tests of a process, and small models to run on it."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from actors.cluster import cluster
from raylign.models import resolve_model
from tests.integration.ranks import Processes
from tests.integration.tiny import random_llama


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the embedded SmolLM2-135M-Instruct."""
    return resolve_model("embedded:smollm2-135m")


@pytest.fixture(scope="session")
def ranks_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 2-layer Llama with tied embeddings for token ids of tests: no tokenizer, and so a small head."""
    return random_llama(tmp_path_factory.mktemp("ranks-llama"), "", vocabulary=12288, width=32, spread=0.2)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """The same with SmolLM2's tokenizer and as many rows."""
    return random_llama(tmp_path_factory.mktemp("tiny-llama"), smollm2, vocabulary=49152, width=32, spread=0.2)


@pytest.fixture(scope="session")
def served_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> str:
    """The same with heads as wide as vLLM asks."""
    return random_llama(tmp_path_factory.mktemp("served-llama"), smollm2, vocabulary=49152, width=128, spread=0.1)


class Shared:
    """What the tests of one process share: a private Ray cluster, and processes in it that become trainer ranks.

    Either is started when it is first asked for.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._resources: dict[str, float] = {}
        self._ranks = Processes()

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

    def stop(self) -> None:
        self._open.close()
        self._resources, self._ranks = {}, Processes()


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
    """Groups of trainer ranks that other test modules use too."""
    return shared.ranks()


@pytest.fixture(scope="module")
def no_cluster(shared: Shared) -> None:
    """This process is in no Ray cluster: the module starts its own."""
    shared.stop()
