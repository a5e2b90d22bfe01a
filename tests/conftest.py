"""How test processes run side by side: in what order, which files share one, and on how many threads."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# More threads than cores wait for each other.
torch.set_num_threads(1)

SHARING_RANKS = (
    "integration/test_reference_policies.py",
    "integration/test_kl_estimates.py",
    "integration/test_reward_trainer.py",
    "integration/test_trainer_state.py",
    "integration/test_group_policy.py",
    "integration/test_trainer_ranks.py",
)
"""Files whose trainer ranks are the same processes if one test process has all of them."""
LONG = (
    "integration/test_job_submission.py",
    *SHARING_RANKS,
    *("integration/test_judge.py", "integration/test_leaks.py", "integration/test_bad_input.py"),
)
"""Begin first of the integration tests, so that no process is left alone with one at the end."""


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
    scheduling._split_scope = lambda test: "ranks" if _name(file_of(test)) in SHARING_RANKS else file_of(test)
    return scheduling


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's programs have it, for this process and what it starts: in a script's background jobs it is
    ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
