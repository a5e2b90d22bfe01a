"""float16: devices without it, and steps that an overflow skipped, on their way to people."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from actors.trainer.deepspeed_engine import deepspeed_config, frozen_engine, reference_config
from raylign.config.blocks import TrainerBlock
from raylign.errors import TrainerError
from raylign.report.tables import round_table, warnings
from raylign.tracking.tracker import step_means
from tests.unit.report.test_reporting import BASELINE, rendered, report

APPLIED = {"loss": 0.5, "rewards/accuracies": 0.8, "rewards/margins": 0.3, "grad_norm": 2.0, "skipped_steps": 0.0}
SKIPPED = {name: value for name, value in APPLIED.items() if name != "grad_norm"} | {"skipped_steps": 1.0}


@pytest.mark.parametrize(("dtype", "name"), [("float16", "is_fp16_supported"), ("bfloat16", "is_bf16_supported")])
def test_a_device_without_the_dtype_is_refused_with_another(
    dtype: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), name, lambda: False)
    for config in (deepspeed_config(TrainerBlock(), dtype), reference_config(dtype, zero_stage=0)):
        with pytest.raises(TrainerError, match=f"does not compute in {dtype}; set model.dtype=.*float16 or float32"):
            frozen_engine(torch.nn.Linear(1, 1), config, dtype)


def test_stage_1_stands_in_for_the_plain_float16_engine() -> None:
    stages: tuple[Any, ...] = (0, 1, 2, 3)
    found = [deepspeed_config(TrainerBlock(zero_stage=stage), "float16") for stage in stages]
    assert [config["zero_optimization"]["stage"] for config in found] == [1, 1, 2, 3]
    assert all(config["data_types"] == {"grad_accum_dtype": "fp32"} for config in found)
    assert all(config["fp16"] == {"enabled": True, "hysteresis": 1, "min_loss_scale": 1} for config in found)


def test_means_are_over_the_steps_that_have_the_metric() -> None:
    means = step_means([SKIPPED, APPLIED, APPLIED | {"grad_norm": 4.0}])
    assert (means["grad_norm"], means["loss"]) == (3.0, 0.5)
    assert means["skipped_steps"] == pytest.approx(1 / 3)
    assert "grad_norm" not in step_means([SKIPPED]) and "non_finite" not in step_means([SKIPPED])


def test_a_round_of_skipped_steps_still_has_its_row() -> None:
    skipped = replace(report(1), steps=(SKIPPED, SKIPPED))
    assert "0.500" in rendered(round_table(BASELINE, [skipped]), 140)


@pytest.mark.parametrize(("skipped", "noted"), [(1, False), (2, True)])
def test_many_skipped_steps_are_noted(skipped: int, noted: bool) -> None:
    reports = [replace(report(1), steps=(SKIPPED,) * skipped + (APPLIED,) * (10 - skipped))]
    notes = [note for note in warnings(BASELINE, reports) if "overflowed float16" in note]
    assert bool(notes) is noted
    assert all(note.startswith("2 of 10 steps were skipped") for note in notes)
