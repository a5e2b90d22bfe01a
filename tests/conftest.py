"""How test processes run side by side: in what order, which files share one, and on how many threads."""

import os
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from raylign.boundary.imports import uncollected

# More threads than cores wait for each other: here, and in what the tests start unless it says otherwise.
# Torch reads it when it is imported, which the process that only hands out tests does not do.
os.environ["OMP_NUM_THREADS"] = "1"

SHARING = (
    "integration/test_bad_input.py",
    *("integration/test_weight_sync.py", "integration/test_lora_sync.py", "integration/test_qlora_sync.py"),
    *("integration/test_export_serving.py", "integration/test_offline_recipes.py"),
    "integration/test_reference_policies.py",
    "integration/test_kl_estimates.py",
    "integration/test_reward_trainer.py",
    "integration/test_trainer_state.py",
    "integration/test_group_policy.py",
    "integration/test_trainer_ranks.py",
)
"""Files whose trainer ranks and engines are in the same processes if one test process has all of them."""
LONG = (
    "integration/test_job_submission.py",
    *SHARING,
    *("integration/test_raw_errors.py", "integration/test_interrupts.py", "integration/test_judge.py"),
    *("integration/test_mlflow_faults.py", "integration/test_scorer_faults.py"),
)
"""Begin first of the integration tests, so that no process is left alone with one at the end.

Those that need a process without a Ray cluster come before those that share one, which then stays.
"""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, which tell most mistakes within a minute; then what takes longest."""
    items.sort(key=lambda item: _turn(_name(item.nodeid.split("::")[0])))


def _name(file: str) -> str:
    return file.removeprefix("tests/")


def _turn(file: str) -> int:
    if file.startswith("unit/"):
        return 0
    return 1 + (LONG.index(file) if file in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` that keeps files which share processes together."""
    if config.getvalue("dist") != "loadfile":
        return None
    scheduling = LoadFileScheduling(config, log)
    file_of = scheduling._split_scope
    scheduling._split_scope = lambda test: "shared" if _name(file_of(test)) in SHARING else file_of(test)
    return scheduling


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's programs have it, for this process and what it starts: in a script's background jobs it is
    ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
