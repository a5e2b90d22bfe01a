"""Weights from one process to another on the same GPU: CUDA's handles, as vLLM's `ipc` engine packs them, against a
safetensors file in shared memory, as raylign's `shm` engine reads it."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from raylign.run.tensor_file import save_tensors

if TYPE_CHECKING:
    from tests.gpu.stage import Stage  # the receiving process needs nothing of it

_BUFFER = 1 << 30
"""Bytes of a chunk; vLLM's DEFAULT_PACKED_BUFFER_SIZE_BYTES."""
_DEVICE_ARGUMENT = 6
"""Where the receiver's device stands among the arguments of `rebuild_cuda_tensor`."""
_ANSWER_S = 60.0
_ROUNDS = 2
"""The last one counts: the first opens handles and makes pages."""
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tensors that lie one after another in a buffer of the sender's GPU memory; `arguments` rebuild the buffer."""

    arguments: tuple[Any, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InFile:
    """All tensors, in a file."""

    path: str


def check(stage: "Stage") -> None:
    shapes = _shapes(stage)
    weights = {name: torch.randn(shape, device=stage.device, dtype=torch.bfloat16) for name, shape in shapes.items()}
    total, wanted = sum(weight.nbytes for weight in weights.values()), checksum(weights)
    if not stage.on_gpu:
        stage.sheet.skip("weights by CUDA's handles", "needs CUDA")
        _within_one_process(stage, weights, wanted)
        return
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(theirs, shapes), daemon=True)
    receiver.start()
    try:
        _answer(ours)
        seconds = {}
        for way, send in (("CUDA's handles", _send_handles), ("shared memory", _send_file)):
            for _ in range(_ROUNDS):
                started = time.perf_counter()
                send(ours, weights)
                seconds[way] = time.perf_counter() - started
            ours.send("checksum")
            stage.sheet.require(f"weights by {way}: the same", _answer(ours) == wanted, "at least", 1)
            told = f"{total / 1e9:.2f} GB in {seconds[way]:.3f} s"
            stage.sheet.inform(f"weights by {way}", total / 1e9 / seconds[way], "GB/s", told)
        ratio = seconds["shared memory"] / seconds["CUDA's handles"]
        stage.sheet.require("CUDA's handles, times the speed of shared memory", ratio, "at least", 1)
        ours.send("end")
        receiver.join(_ANSWER_S)
    finally:
        receiver.kill()


def _shapes(stage: "Stage") -> Shapes:
    """About those of Qwen3-1.7B: 3.4 GB in bf16."""
    if stage.tiny:
        return {"embedding": (64, 8), "layer": (8, 8)}
    layer = {"q": (2048, 2048), "k": (1024, 2048), "v": (1024, 2048), "o": (2048, 2048)}
    layer |= {"gate": (6144, 2048), "up": (6144, 2048), "down": (2048, 6144)}
    layers = {f"layers.{n}.{name}": shape for n in range(28) for name, shape in layer.items()}
    return {"embedding": (151936, 2048)} | layers


def _within_one_process(stage: "Stage", weights: Mapping[str, Tensor], wanted: int) -> None:
    """The file is written and read."""
    taken = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with _file() as path:
        save_tensors(weights.items(), path)
        take(InFile(str(path)), taken)
    stage.sheet.require("weights by shared memory: the same", checksum(taken) == wanted, "at least", 1)


def _send_handles(receiver: Connection, weights: Mapping[str, Tensor]) -> None:
    for names in chunks(weights, _BUFFER):
        buffer = torch.cat([weights[name].view(torch.uint8).flatten() for name in names])
        torch.cuda.synchronize()
        receiver.send(Chunk(reduce_tensor(buffer)[1], names))  # type: ignore[no-untyped-call]
        _answer(receiver)


def chunks(weights: Mapping[str, Tensor], size: int) -> Iterator[tuple[str, ...]]:
    """Names of up to `size` bytes at a time; a larger tensor alone."""
    held, names = 0, list[str]()
    for name, weight in weights.items():
        if names and held + weight.nbytes > size:
            yield tuple(names)
            held, names = 0, []
        held += weight.nbytes
        names.append(name)
    yield tuple(names)


def _send_file(receiver: Connection, weights: Mapping[str, Tensor]) -> None:
    with _file() as path:
        save_tensors(weights.items(), path)
        receiver.send(InFile(str(path)))
        _answer(receiver)


@contextmanager
def _file() -> Iterator[Path]:
    """A path in shared memory for a while."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="one-gpu-") as folder:
        yield Path(folder, "weights.safetensors")


def receive(sender: Connection, shapes: Shapes) -> None:
    """The other process: takes what comes into tensors of its own until it is told to end."""
    device = torch.device("cuda", 0)
    taken = {name: torch.zeros(*shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}
    sender.send("ready")
    while (asked := sender.recv()) != "end":
        if asked == "checksum":
            sender.send(checksum(taken))
            continue
        take(asked, taken)
        torch.cuda.synchronize()
        sender.send("taken")


def take(sent: Chunk | InFile, taken: Mapping[str, Tensor]) -> None:
    """Copy what was sent into the tensors `taken`."""
    if isinstance(sent, InFile):
        with safe_open(sent.path, framework="pt") as file:
            for name, own in taken.items():
                own.copy_(file.get_tensor(name))
        return
    arguments = list(sent.arguments)
    arguments[_DEVICE_ARGUMENT] = 0
    buffer: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    sizes = [taken[name].nbytes for name in sent.names]
    for name, part in zip(sent.names, torch.split(buffer, sizes), strict=True):
        taken[name].copy_(part.view(taken[name].dtype).view_as(taken[name]))


def checksum(weights: Mapping[str, Tensor]) -> int:
    """Of all bytes, tensor by tensor."""
    sums = (int(weight.view(torch.int16).sum(dtype=torch.int64)) for weight in weights.values())
    return sum(number * one for number, one in enumerate(sums, 1))


def _answer(connection: Connection) -> Any:
    """What the other process says; TimeoutError when it says nothing."""
    if not connection.poll(_ANSWER_S):
        raise TimeoutError(f"the other process has not answered within {_ANSWER_S:.0f} s")
    return connection.recv()
