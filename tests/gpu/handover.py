"""What leaves the GPU and comes back: how much, how fast, and whether training notices."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from actors.trainer.device_memory import module_tensors
from actors.trainer.rank import DeepSpeedRank
from actors.trainer.state import MOMENTS, WEIGHTS
from tests.gpu.ranks import spec_of, start_rank, with_reference
from tests.gpu.stage import GIB, Stage, preference, random_ids, tiny_folder

_LEFT = 0.02
"""Share of what was held that may stay: workspaces of libraries."""
_HOST_SHARE = 2.2
"""Main memory that is needed, times what leaves: PyTorch rounds pinned memory up to powers of two."""
_STEPS = 4
_KINDS = (WEIGHTS, *MOMENTS)


@dataclass(frozen=True, slots=True)
class Way:
    """Bytes that PyTorch says are held before and after, and the seconds that it took."""

    before: int
    after: int
    seconds: float

    @property
    def rate(self) -> float:
        """GB/s."""
        return abs(self.before - self.after) / 1e9 / self.seconds


def check_large(stage: Stage, rank: DeepSpeedRank) -> None:
    """Of a rank that holds everything: out and back twice; the second time its main memory is there already."""
    if not stage.on_gpu:
        stage.sheet.skip("what leaves the GPU and comes back", "needs CUDA")
        return
    held, room = torch.cuda.memory_allocated(), _host_room()
    if room < _HOST_SHARE * held:
        told = f"{held / GIB:.0f} GiB are held, and main memory has {room / GIB:.0f} GiB free"
        stage.sheet.skip("what leaves the GPU and comes back", told)
        return
    before = _sums(rank)
    first = _timed(lambda: rank.offload(keep_weights=False))
    rank.reload(weights_alone=False)
    out = _timed(lambda: rank.offload(keep_weights=False))
    back = _timed(lambda: rank.reload(weights_alone=False))
    sheet = stage.sheet
    sheet.require("still held after leaving", out.after / out.before, "at most", _LEFT, "of it")
    sheet.inform("left the GPU", (out.before - out.after) / GIB, "GiB")
    sheet.inform("leaving the first time", first.rate, "GB/s", f"{first.seconds:.2f} s, main memory is made for it")
    sheet.inform("leaving again", out.rate, "GB/s", f"{out.seconds:.2f} s")
    sheet.inform("coming back", back.rate, "GB/s", f"{back.seconds:.2f} s")
    sheet.require("held after coming back, difference", abs(back.after / out.before - 1), "at most", 0.01, "of it")
    after = _sums(rank)
    changed = sum(after.get(key) != total for key, total in before.items())
    sheet.require("storages that changed on the way", changed, "at most", 0, f"of {len(before)}")
    rank.offload(keep_weights=True)
    weights = sum(storage.nbytes() for storage in _storages([*module_tensors(rank._engine.module)]).values())
    kept = torch.cuda.memory_allocated()
    sheet.require("held beside the weights that stay", abs(kept - weights) / held, "at most", _LEFT, "of all")
    rank.reload(weights_alone=False)


def check_steps(stage: Stage) -> None:
    """Steps with ways out and back between them beside steps without: bit by bit, if two runs without are."""
    with torch.random.fork_rng(devices=[]):
        torch.use_deterministic_algorithms(True, warn_only=True)
        straight, again, moved = (_trained(stage, leaves=leaves) for leaves in (False, False, True))
        torch.use_deterministic_algorithms(False)
    noise, apart = ((straight - other).abs().max().item() for other in (again, moved))
    what = f"weights after {_STEPS} steps with ways out and back, from those without"
    stage.sheet.require(what, apart, "at most", noise, "", f"two runs without differ by {noise:.3g}")


def _trained(stage: Stage, *, leaves: bool) -> Tensor:
    """fp32 weights and moments after all steps."""
    model, trainer = {"dtype": "bfloat16"}, {"learning_rate": 1e-3, "num_train_epochs": _STEPS}
    generator = torch.Generator().manual_seed(7)
    drawn = [[random_ids(generator, length, 512) for length in (9, 12, 12)] for _ in range(4)]
    pairs = [preference(n, prompt, completions) for n, (prompt, *completions) in enumerate(drawn)]
    rank = start_rank(spec_of(stage, tiny_folder(stage), model, {**trainer, "per_device_train_batch_size": 4}))
    rank.begin_round(with_reference(rank, pairs, 0), 0, 0, ())
    for _ in range(_STEPS):
        rank.train_step()
        if leaves:
            rank.offload(keep_weights=False)
            rank.reload(weights_alone=False)
    state = rank._engine.state
    parts = [state.read(name, kind).flatten() for name in state.names() for kind in _KINDS]
    return torch.cat(parts).to("cpu", torch.float64, copy=True)


def _timed(act: Callable[[], None]) -> Way:
    torch.cuda.synchronize()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    act()
    torch.cuda.synchronize()
    return Way(before, torch.cuda.memory_allocated(), time.perf_counter() - started)


def _sums(rank: DeepSpeedRank) -> dict[int, int]:
    """A sum over each storage of the model and the optimizer, by its address."""
    state = rank._engine.state
    moments = [state.read(name, kind) for name in state.names() for kind in _KINDS]
    return {key: _sum(storage) for key, storage in _storages([*module_tensors(rank._engine.module), *moments]).items()}


def _storages(tensors: Sequence[Tensor]) -> dict[int, UntypedStorage]:
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return {key: storage for key, storage in found.items() if storage.nbytes()}


def _sum(storage: UntypedStorage) -> int:
    raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    whole = raw[: len(raw) // 8 * 8].view(torch.int64)
    total = int(raw[len(whole) * 8 :].sum(dtype=torch.int64))
    for number, part in enumerate(torch.split(whole, 1 << 24), 1):
        total += number * int(part.sum())
    return total


def _host_room() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        found = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in file)}
    return found["MemAvailable"]
