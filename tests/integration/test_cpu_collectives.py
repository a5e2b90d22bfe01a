"""A trainer that was killed while it compiled DeepSpeed's collectives does not stop the ones after it."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.integration.tiny import ROOT, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NAME = "deepspeed_shm_comm"
LOAD = "from actors.cpu_collectives import load_cpu_collectives; load_cpu_collectives(200)"


def test_the_mark_of_a_killed_build_is_not_waited_for() -> None:
    """Trainers of other tests make and remove marks of their own meanwhile."""
    mark = Path(_get_build_directory(NAME, verbose=False)) / "lock"
    mark.touch()
    left = mark.stat().st_ino, mark.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", LOAD], env=clean_environment({}), cwd=ROOT, check=True, timeout=300)
    assert not mark.exists() or (mark.stat().st_ino, mark.stat().st_mtime_ns) != left
