"""The memory that a plan shows for each device and phase, and what is refused before the start."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from raylign.config import load_config
from raylign.config.blocks import PlacementBlock
from raylign.config.offline import OfflineDpoConfig
from raylign.errors import PlacementError
from raylign.records import Candidate, Preference, Prompt
from raylign.training.memory import GIB
from recipes import memory
from recipes.commands.plan import ReferenceFacts
from recipes.commands.plan_online import RunPlan, make_plan, print_plan
from recipes.memory import MemoryPlan, Subject, begin_check, gpu_bytes, memory_notes, memory_plan, trainer_needs
from tests.unit.tiny_policy import LORA_PARAMETERS, PARAMETERS, save_recipe

Plan = Callable[..., RunPlan]
ON_GPUS = ("placement.device=auto", "placement.gpu_memory_gb=24")
EVERY = ("model.lora=null",)
PROMPTS = [Prompt("p", (), (1,) * length) for length in (3, 6)]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans the tiny recipe with overrides, as a machine without RAY_ADDRESS and GPUs does."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("recipes.commands.plan.gpus", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program: None)
    recipe = save_recipe(tmp_path)
    return lambda *overrides: make_plan(load_config(recipe, overrides))


def rows_of(found: MemoryPlan, name: str) -> dict[str, int]:
    (phase,) = (one for one in found.phases if one.name == name)
    return dict(phase.rows)


def test_on_cpus_each_process_has_what_it_takes_and_nothing_is_refused(plan: Plan) -> None:
    found = plan("generators.kv_cache_gb=1000").memory
    assert [(phase.where, phase.name) for phase in found.phases] == [
        ("generator", "all phases"),
        ("trainer rank", "all phases"),
    ]
    assert found.phases[0].rows == {
        "engine weights*": 2 * (PARAMETERS + LORA_PARAMETERS),
        "KV cache*": 1000 * GIB,
    }
    rows = dict(found.phases[1].rows)
    assert rows["weights"] == 2 * (PARAMETERS + LORA_PARAMETERS)
    assert (rows["fp32 masters"], rows["moments"], rows["gradients"]) == tuple(LORA_PARAMETERS * n for n in (4, 8, 4))
    assert (found.each, rows["reference"]) == (None, 0)


def test_a_laptop_plans_for_gpus_that_take_turns(plan: Plan) -> None:
    shown = plan(*ON_GPUS, *EVERY, "trainer.ranks=4")
    assert shown.placement.device == "gpu" and shown.cluster == "a cluster of GPUs of 24 GiB"
    found = shown.memory
    assert {phase.where for phase in found.phases} == {"generator and trainer"}
    sampling, training, publishing = (rows_of(found, name) for name in ("sampling", "training", "publishing"))
    assert sampling == {
        "engine weights*": 2 * PARAMETERS,
        "KV cache*": int(0.85 * 24 * GIB) - 2 * PARAMETERS - GIB,
        "engine context*": GIB,
        "trainer context": GIB // 2,
    }
    assert {"engine weights*", "KV cache*"}.isdisjoint(training) and training["engine context*"] == GIB
    assert (training["weights"], training["moments"]) == (2 * PARAMETERS, 8 * PARAMETERS)
    assert training["reference"] == 2 * PARAMETERS
    assert publishing == {
        "engine weights*": 2 * PARAMETERS,
        "engine context*": GIB,
        "weights": 2 * PARAMETERS,
        "trainer context": GIB // 2,
    }


def test_without_sleep_everything_is_there_at_once(plan: Plan) -> None:
    turns = plan(*ON_GPUS, *EVERY).memory
    found = plan(*ON_GPUS, *EVERY, "generators.enable_sleep_mode=false", "generators.gpu_memory_utilization=0.5").memory
    (phase,) = found.phases
    training = rows_of(turns, "training")
    assert {name: phase.rows[name] for name in training} == training
    assert phase.rows["KV cache*"] > 8 * GIB
    assert "generators.enable_sleep_mode=true" in [cure.setting for cure in phase.cures]


def test_disaggregated_gpus_keep_what_they_have(plan: Plan) -> None:
    sizes = ("generators.tensor_parallel_size=2", "trainer.ranks=2", "trainer.zero_stage=2")
    found = plan(*ON_GPUS, *EVERY, "placement.mode=disaggregated", *sizes).memory
    assert [(phase.where, phase.name) for phase in found.phases] == [
        ("generator", "sampling"),
        ("generator", "publishing"),
        ("trainer", "training"),
    ]
    assert rows_of(found, "sampling")["engine weights*"] == PARAMETERS
    assert rows_of(found, "training")["moments"] == 4 * PARAMETERS


def test_a_scorer_that_shares_the_gpu_is_there_all_the_time(plan: Plan, tmp_path: Path) -> None:
    share = ("placement.scorer_gpus=0.25", "placement.scorer_cpus=1")
    found = plan(*ON_GPUS, "generators.gpu_memory_utilization=0.6", *share).memory
    assert [phase.rows["scorer*"] for phase in found.phases] == [6 * GIB] * 3
    with pytest.raises(PlacementError, match=r"sampling needs 26.90 GiB .*gpu_memory_utilization=0.72 "):
        plan(*ON_GPUS, *share)


@pytest.fixture
def large(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryPlan]:
    """The memory of the tiny recipe with every weight of a model of Qwen3-1.7B's shape."""
    placement = plan(*ON_GPUS, *EVERY).placement
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Qwen3ForCausalLM(config).named_parameters()}
    numel = sum(math.prod(shape) for shape in shapes.values())
    monkeypatch.setattr(memory, "checkpoint_manifest", lambda folder: shapes)
    monkeypatch.setattr(memory, "read_config", lambda folder, trust: config)
    monkeypatch.setattr(memory, "reference_facts", lambda *_: ReferenceFacts("a frozen copy", 2 * numel))

    def found(*overrides: str, gpu_gib: float) -> MemoryPlan:
        read = load_config(tmp_path / "tiny.yaml", (*ON_GPUS, *EVERY, *overrides))
        return memory_plan(read, Subject(tmp_path, numel, PROMPTS), placement, int(gpu_gib * GIB))

    return found


def test_what_does_not_fit_is_refused_with_three_settings(large: Callable[..., MemoryPlan]) -> None:
    """1.72 billion weights of 2 + 4 + 8 + 4 bytes, and 2 of their frozen copy."""
    large(gpu_gib=48).require_fit()
    with pytest.raises(PlacementError) as caught:
        large(gpu_gib=24).require_fit()
    told = str(caught.value)
    assert told.startswith("training needs 34.1") or told.startswith("training needs 33.")
    assert "GiB of a GPU of the generator and trainer, which has 24.00 (GiB: moments 12.82, fp32 masters 6.41" in told
    cures = told.split("what would help: ")[1].split("; ")
    assert len(cures) == 3 and cures[0].startswith("model.lora.r=16 (")
    assert {cure.split(" (")[0] for cure in cures[1:]} == {
        "trainer.offload.optimizer=true with trainer.zero_stage=2",
        "trainer.zero_stage=3 with trainer.ranks=2",
    }


def test_an_engine_that_its_share_is_too_small_for_is_refused(large: Callable[..., MemoryPlan]) -> None:
    with pytest.raises(PlacementError, match=r"generators.gpu_memory_utilization=0.08 of 48.00 GiB is less") as caught:
        large("generators.gpu_memory_utilization=0.08", gpu_gib=48).require_fit()
    assert "what would help: raise generators.gpu_memory_utilization; generators.tensor_parallel_size=2 with" in str(
        caught.value
    )


def test_a_kv_cache_holds_a_sequence_at_least(large: Callable[..., MemoryPlan]) -> None:
    tight = large("generators.gpu_memory_utilization=0.08", gpu_gib=48)
    assert rows_of(tight, "sampling")["KV cache*"] == 2 * 28 * 8 * 128 * 2 * 32


def test_what_a_plan_refuses_a_run_refuses_before_its_actors(plan: Plan, tmp_path: Path) -> None:
    config = load_config(tmp_path / "tiny.yaml", ("placement.device=auto", "placement.gpu_memory_gb=2"))
    placement = plan(*ON_GPUS).placement
    with pytest.raises(PlacementError, match="what would help"):
        begin_check(config, str(tmp_path / "policy"), PROMPTS)(placement)
    for settings in ((), ("placement.gpu_memory_gb=2",)):
        begin_check(load_config(tmp_path / "tiny.yaml", settings), str(tmp_path / "policy"), PROMPTS)(plan().placement)


def test_the_page_has_the_table_and_says_what_is_estimated(plan: Plan, tmp_path: Path) -> None:
    console = Console(width=300, record=True, file=(tmp_path / "page.txt").open("w"))
    print_plan(plan(*ON_GPUS, "trainer.zero_stage=1", "trainer.offload.optimizer=true"), console)
    page = console.export_text()
    for fact in (
        "GiB of a GPU",
        "generator and trainer",
        "fp32 masters",
        "KV cache*",
        "together",
        "24.00",
        "rows with * are estimates until an engine was measured on a GPU",
        "1 CPU, 1 GPU on a cluster of GPUs of 24 GiB",
    ):
        assert fact in page, f"{fact!r} is not in\n{page}"


def test_memory_that_nobody_knows_is_asked_for() -> None:
    (_, note) = memory_notes(MemoryPlan("gpu", (), None, 0))
    assert "set placement.gpu_memory_gb" in note
    assert memory_notes(MemoryPlan("cpu", (), None, 0)) == []


def test_the_smallest_gpu_here_counts_unless_the_cluster_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=memory.total ] && printf "81559\\n24564\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options: dict[str, Any] = {"gpu_memory_gb": 80.0}
    assert gpu_bytes(PlacementBlock()) == 24564 << 20
    assert gpu_bytes(PlacementBlock(**options)) == 80 * GIB
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert gpu_bytes(PlacementBlock()) is None and gpu_bytes(PlacementBlock(**options)) == 80 * GIB
    monkeypatch.delenv("RAY_ADDRESS")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_bytes(PlacementBlock()) is None


def test_passes_are_as_long_as_the_rows_make_them(plan: Plan, tmp_path: Path) -> None:
    """Two pairs of prompts of up to 6 tokens and answers of up to 10; all of a ranking; rows as given."""

    def tokens(*overrides: str) -> int:
        config = load_config(tmp_path / "tiny.yaml", overrides)
        return trainer_needs(config, Subject(tmp_path / "policy", 1, PROMPTS), "cpu").tokens

    assert tokens() == 2 * 2 * (6 + 10)
    assert tokens("loss.loss_type=plackett_luce", "pairing.type=ranking") == 2 * 4 * (6 + 10)
    assert tokens("trainer.max_tokens_per_micro_batch=20") == 20
    assert tokens("trainer.max_tokens_per_micro_batch=2") == 6 + 10
    answers = tuple(Candidate("p", n, (1,) * n, (0.0,) * n, "", "stop", 0, 0) for n in (4, 7, 2))
    row = Preference(PROMPTS[0], answers, (3.0, 2.0, 1.0), (1.0,) * 3)
    block = OfflineDpoConfig.model_validate(
        {"data": {"source": "rows.json"}, "model": {"path": str(tmp_path / "policy")}}
    )
    needs = trainer_needs(block, Subject(tmp_path / "policy", 1, [row]), "cpu")
    assert (needs.longest, needs.candidates) == (10, 3)
