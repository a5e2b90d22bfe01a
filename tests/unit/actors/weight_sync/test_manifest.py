"""Manifests of weight files, the choice of a transport, and room in shared memory."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from actors.weight_sync.folder import require_room
from actors.weight_sync.manifest import checkpoint_manifest, file_manifest, require_same
from actors.weight_sync.transports import Name, choose_transport
from raylign.errors import PlacementError, WeightSyncError

Device = Literal["cpu", "gpu"]
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def folder(path: Path, tied: bool | None) -> Path:
    """Two shards and a config."""
    save_file({EMBEDDING: torch.zeros(5, 3), HEAD: torch.zeros(5, 3)}, path / "model-00001-of-00002.safetensors")
    save_file({NORM: torch.zeros(3, dtype=torch.bfloat16)}, path / "model-00002-of-00002.safetensors")
    config = {"model_type": "llama"} | ({} if tied is None else {"tie_word_embeddings": tied})
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_file_manifest_has_names_and_shapes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, 4), "scalar": torch.tensor(1.0)}, tmp_path / "w.safetensors")
    assert file_manifest(tmp_path / "w.safetensors") == {"a": (2, 3, 4), "scalar": ()}


@pytest.mark.parametrize("tied", [False, None])
def test_a_checkpoint_manifest_covers_every_shard(tied: bool | None, tmp_path: Path) -> None:
    assert checkpoint_manifest(folder(tmp_path, tied)) == {EMBEDDING: (5, 3), HEAD: (5, 3), NORM: (3,)}


def test_a_tied_head_is_left_out_even_if_the_file_has_it(tmp_path: Path) -> None:
    assert checkpoint_manifest(folder(tmp_path, tied=True)) == {EMBEDDING: (5, 3), NORM: (3,)}


def test_equal_manifests_pass_in_any_order() -> None:
    require_same({"a": (1, 2), "b": (3,)}, {"b": (3,), "a": (1, 2)})


def test_every_difference_is_named() -> None:
    with pytest.raises(WeightSyncError) as caught:
        require_same({"a": (1, 2), "b": (3,), "c": (4,)}, {"b": (3, 1), "c": (4,), "x": (9,)})
    assert str(caught.value) == (
        "weight push refused, nothing was changed: missing: a; unknown: x; "
        "wrong shape: b has shape [3, 1], the model has [3]. "
        "Trainer and generators must load the same model.path and model.revision"
    )


def test_long_lists_are_cut_with_their_count() -> None:
    with pytest.raises(WeightSyncError, match=r"changed: missing: w0, w1, w2 and 4 more\. Trainer"):
        require_same({f"w{index}": (1,) for index in range(7)}, {})
    with pytest.raises(WeightSyncError, match=r"changed: unknown: w0, w1, w2\. Trainer"):
        require_same({}, {f"w{index}": (1,) for index in range(3)})


@pytest.mark.parametrize(
    ("device", "adapter", "own_devices", "chosen"),
    [
        ("cpu", True, True, "shm"),
        ("cpu", True, False, "shm"),
        ("cpu", False, True, "shm"),
        ("cpu", False, False, "shm"),
        ("gpu", True, True, "lora"),
        ("gpu", True, False, "lora"),
        ("gpu", False, True, "nccl"),
        ("gpu", False, False, "ipc"),
    ],
)
def test_auto_chooses_by_device_adapter_and_placement(
    device: Device, adapter: bool, own_devices: bool, chosen: Name
) -> None:
    assert choose_transport("auto", device=device, adapter=adapter, own_devices=own_devices) == chosen


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_auto_keeps_the_adapter_apart_from_a_base_that_is_asked_too(device: Device) -> None:
    assert choose_transport("auto", device=device, adapter=True, own_devices=True, keeps_base=True) == "lora"


@pytest.mark.parametrize("named", ["lora", "shm"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_named_transport_is_taken(named: Name, device: Device) -> None:
    assert choose_transport(named, device=device, adapter=False, own_devices=False) == named


def test_nccl_is_taken_between_separate_gpus_only() -> None:
    assert choose_transport("nccl", device="gpu", adapter=False, own_devices=True) == "nccl"
    with pytest.raises(PlacementError, match="needs GPUs"):
        choose_transport("nccl", device="cpu", adapter=False, own_devices=True)
    with pytest.raises(PlacementError, match="placement.mode=disaggregated"):
        choose_transport("nccl", device="gpu", adapter=False, own_devices=False)


def test_handles_of_cuda_need_a_rank_on_every_generators_gpu() -> None:
    assert choose_transport("ipc", device="gpu", adapter=False, own_devices=False) == "ipc"
    assert choose_transport("auto", device="gpu", adapter=False, own_devices=False, ranks_beside=False) == "shm"
    for own_devices, ranks_beside in ((True, True), (False, False)):
        with pytest.raises(PlacementError, match="trainer rank on the GPU of every generator"):
            choose_transport("ipc", device="gpu", adapter=False, own_devices=own_devices, ranks_beside=ranks_beside)
    with pytest.raises(PlacementError, match="needs GPUs"):
        choose_transport("ipc", device="cpu", adapter=False, own_devices=False)


def test_room_is_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64_000_000))
    require_room(tmp_path, 64_000_000)
    with pytest.raises(WeightSyncError) as caught:
        require_room(tmp_path, 270_000_000)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}: 64 MB free, a weight push needs 270 MB; enlarge /dev/shm (docker --shm-size")
