"""A trainer that was killed while it compiled DeepSpeed's collectives does not stop the ones after it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.integration.tiny import ROOT, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NAME = "deepspeed_shm_comm"
LOAD = "from actors.cpu_collectives import load_cpu_collectives; load_cpu_collectives(200)"


def test_the_mark_of_a_killed_build_is_not_waited_for(tmp_path: Path) -> None:
    """In a build folder of its own: other trainers make and remove their marks all the time."""
    built = Path(_get_build_directory(NAME, verbose=False))
    shutil.copytree(built, tmp_path / NAME, ignore=shutil.ignore_patterns("*lock"))
    mark = tmp_path / NAME / "lock"
    mark.touch()
    environment = clean_environment({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    subprocess.run([sys.executable, "-c", LOAD], env=environment, cwd=ROOT, check=True, timeout=300)
    assert not mark.exists() and list((tmp_path / NAME).glob("*.so"))
