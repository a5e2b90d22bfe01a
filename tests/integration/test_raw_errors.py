"""Real errors of vLLM, torch and Ray, as a person gets them: what happened, the cure, and a file with the rest.

The clusters of the roles are started with secrets around, which neither those errors nor runtime environments show.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import typer
from ray.actor import ActorHandle

from actors.cluster import actor_environment, cluster
from actors.generator.actor import EngineSpec, GeneratorActor
from actors.supervision.generators import SupervisedGenerators, actor_name
from actors.weight_sync.transports import ShmTransport
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock, RunBlock
from raylign.errors import GeneratorError, RaylignError
from raylign.roles import Generator
from recipes.commands.cli import ended_cleanly
from recipes.commands.failures import told
from tests.fakes import quiet_supervision
from tests.integration.ranks import spec_of
from tests.integration.secret_run import OF_NODES, SECRET
from tests.integration.test_trainer_faults import Trainers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_cluster")]


def engine(model: str, stacks: Path) -> EngineSpec:
    """One whose KV cache has room for 8 of its 512 positions."""
    return EngineSpec(
        model=model,
        dtype="float32",
        device="cpu",
        transport=ShmTransport.engine,
        lora_rank=0,
        tensor_parallel_size=1,
        max_model_len=512,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        kv_cache_gb=1e-5,
        enforce_eager=True,
        sleeps=False,
        trust_remote_code=False,
        seed=0,
        threads=1,
        stacks=str(stacks),
    )


def start_generators(model: str, folder: Path) -> None:
    spec = engine(model, folder)

    def spawn(slot: int) -> ActorHandle[Generator]:
        handle: ActorHandle[Generator] = GeneratorActor.options(num_cpus=0).remote(spec, actor_name(slot))
        return handle

    SupervisedGenerators(
        spawn,
        block=GeneratorsBlock(count=1),
        recovery=RecoveryBlock(),
        supervision=quiet_supervision("generator", GeneratorError, folder),
    ).wait_ready()


def start_trainers(model: str, folder: Path) -> None:
    spec = replace(spec_of(model, {}, {}), folder=str(folder / "none"), stacks=str(folder))
    Trainers(spec, folder)


def passed_on() -> tuple[list[str], dict[str, str]]:
    """The runtime environments of this driver and of its tasks, and what is around a task."""
    task = ray.remote(lambda: (dict(ray.get_runtime_context().runtime_env), dict(os.environ)))
    inside, around = ray.get(task.remote())
    return [json.dumps(dict(ray.get_runtime_context().runtime_env)), json.dumps(inside)], around


@pytest.mark.parametrize(
    ("start", "role", "cure"),
    [
        (start_generators, "starting the generators", "raise generators.kv_cache_gb"),
        (start_trainers, "starting the trainers", "run the same command again"),
    ],
)
def test_a_role_that_cannot_start(
    start: Callable[[str, Path], None],
    role: str,
    cure: str,
    served_llama: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in OF_NODES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "demo").mkdir()
    run = RunBlock(dir=tmp_path, name="demo")
    with pytest.raises(typer.Exit) as ended, ended_cleanly(), told(run), cluster(num_cpus=2):
        texts, around = passed_on()
        start(served_llama, tmp_path)
    assert ended.value.exit_code == 1 and not ray.is_initialized()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "cure: "))]
    first, second = lines
    assert first.startswith(f"error: {role}: ") and len(first) < 400 and "ray::" not in first
    assert cure in second
    (path,) = (tmp_path / "demo").glob("error-*.txt")
    assert second.endswith(f"; the rest is in {path}")
    text = path.read_text()
    assert "Traceback" in text and re.search(r"The end of .*worker-.*:", text), text[-3000:]
    wanted = actor_environment(private=True)
    assert "PATH" in wanted and wanted.items() <= around.items()
    assert [shown for shown in (*texts, json.dumps(actor_environment()), text) if SECRET in shown] == []
    assert os.environ["HF_TOKEN"] == around["HF_TOKEN"] == SECRET


def test_a_cluster_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\nThis process: 2.60")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address, told_so in (("10.0.0.1:6379", "RAY_ADDRESS=10.0.0.1:6379: cannot join"), ("", "Ray cannot start")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RaylignError) as caught, cluster():
            sys.exit("never reached")
        assert str(caught.value).startswith(told_so) and "\n" not in str(caught.value)
        assert "install the same Ray and Python" in caught.value.cure
