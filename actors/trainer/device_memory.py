"""What a trainer rank holds on its GPU, moved to main memory while somebody else needs the GPU, and back."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage, nn


@dataclass(slots=True)
class _Moved:
    """A storage, and where its bytes are while it is empty. The host's room is kept for the next time."""

    storage: UntypedStorage
    host: Tensor
    away: bool


class DeviceMemory:
    """All tensors of this process on `device`.

    Their storages are emptied and filled again in place, so that every view stays what it is: the flat buffers of
    DeepSpeed with the parameters that lie in them, AdamW's moments, quantised weights. DeepSpeed's own `offload_states`
    would leave stages 0 and 1 out, and what is not its optimizer's: references, gradients, the weights themselves.
    What has fewer than `smallest` bytes stays: the weights alone need the indices that kernels keep.
    """

    def __init__(self, device: torch.device, smallest: int = 1 << 20) -> None:
        self._device, self.smallest = device, smallest
        self._moved: dict[int, _Moved] = {}

    def offload(self, only: Iterable[Tensor] | None = None) -> int:
        """Move all, or `only` these, to main memory; returns the bytes moved."""
        moved = 0
        for key, storage in list(storages(self.held() if only is None else only)):
            if storage.nbytes() < max(1, self.smallest):
                continue
            self._to_host(key, storage)
            moved += self._moved[key].host.nbytes
        # Storages that nobody uses any more are not to be filled again.
        self._moved = {key: one for key, one in self._moved.items() if one.away}
        self._return_cache()
        return moved

    def reload(self, but: Iterable[Tensor] = ()) -> None:
        """Move back everything but these."""
        left = {key for key, _ in storages(but)}
        for key, one in self._moved.items():
            if one.away and key not in left:
                one.storage.resize_(one.host.nbytes)
                _bytes_of(one.storage).copy_(one.host, non_blocking=True)
                one.away = False
        self._synchronize()

    def _to_host(self, key: int, storage: UntypedStorage) -> None:
        known = self._moved.get(key)
        if known is None or known.host.nbytes != storage.nbytes():
            pinned = self._device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            known = self._moved[key] = _Moved(storage, host, away=False)
        known.host.copy_(_bytes_of(storage))
        storage.resize_(0)
        known.away = True

    def held(self) -> Iterator[Tensor]:
        """Every tensor on the device that Python knows of, gradients included."""
        hosts = {id(one.host) for one in self._moved.values()}
        for found in gc.get_objects():
            if issubclass(type(found), Tensor) and id(found) not in hosts and found.device == self._device:
                yield found
                if found.is_leaf and found.grad is not None:
                    yield found.grad

    def _return_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers, and this rank's parts of them under ZeRO-3."""
    for parameter in module.parameters():
        yield parameter
        if (part := getattr(parameter, "ds_tensor", None)) is not None:
            yield part
    yield from module.buffers()


def apart_from(weights: Iterable[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of `tensors` that share no storage with `weights`."""
    kept = {key for key, _ in storages(weights)}
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in kept]


def tensors_in(found: object) -> Iterator[Tensor]:
    """Those in containers of containers, with their gradients."""
    match found:
        case Tensor():
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad
        case dict():
            yield from (tensor for part in found.values() for tensor in tensors_in(part))
        case list() | tuple() | set():
            yield from (tensor for part in found for tensor in tensors_in(part))


def storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, UntypedStorage]]:
    """Each storage once that can be emptied, by its address."""
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage.resizable():
            seen.add(storage._cdata)
            yield storage._cdata, storage


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
