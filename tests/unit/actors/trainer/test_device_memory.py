"""Tensors that leave a device and come back: every byte, every view, and steps as if nothing had happened."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from actors.trainer.device_memory import DeviceMemory, module_tensors, tensors_in
from raylign.config.blocks import TrainerBlock
from raylign.training.masters import Kind, MasterWeights


class Known(DeviceMemory):
    """Of the CPU only the tensors of this test: pytest has others."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(torch.device("cpu"), smallest=0)
        self._tensors = tensors

    def held(self) -> Iterator[Tensor]:
        for tensor in self._tensors:
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad


class Trained:
    """A model in bf16 whose weights lie in one flat buffer, as DeepSpeed's do, with fp32 masters and moments."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).to(torch.bfloat16)
        parameters = dict(self.model.named_parameters())
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        start = 0
        for parameter in parameters.values():
            parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.flat = flat
        self.masters = MasterWeights(parameters, TrainerBlock(learning_rate=1e-2))
        self.step()

    def step(self) -> None:
        inputs = torch.linspace(-1, 1, 24).view(3, 8).to(torch.bfloat16)
        self.model(inputs).float().square().sum().backward()
        self.masters.step(1e-2)

    def tensors(self) -> list[Tensor]:
        kinds: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq")
        moments = [self.masters.read(name, kind) for name in self.masters.names() for kind in kinds]
        return [*self.model.parameters(), *self.model.buffers(), *moments]


def nbytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_training_goes_on_bit_by_bit() -> None:
    moved, stayed = Trained(), Trained()
    memory = Known(moved.tensors())
    for _ in range(3):
        held = nbytes(moved.tensors())
        assert memory.offload() == held and nbytes(moved.tensors()) == 0
        memory.reload()
        assert nbytes(moved.tensors()) == held
        moved.step()
        stayed.step()
        for one, other in zip(moved.tensors(), stayed.tensors(), strict=True):
            assert torch.equal(one, other)
        assert next(moved.model.parameters()).untyped_storage()._cdata == moved.flat.untyped_storage()._cdata


def test_weights_may_stay_or_come_back_alone() -> None:
    trained = Trained()
    memory, weights = Known(trained.tensors()), list(module_tensors(trained.model))
    before, whole = [tensor.clone() for tensor in trained.tensors()], nbytes(weights)
    training = list(trained.masters.tensors())
    memory.offload(only=training)
    assert nbytes(trained.tensors()) == nbytes(weights) == whole
    memory.offload()
    assert nbytes(trained.tensors()) == 0
    memory.reload(but=training)
    assert nbytes(trained.tensors()) == whole
    memory.reload()
    assert all(torch.equal(one, other) for one, other in zip(trained.tensors(), before, strict=True))


def test_tensors_are_found_in_containers_of_containers() -> None:
    leaf = torch.ones(2, requires_grad=True)
    torch.autograd.backward(leaf.sum())
    other = torch.ones(3)
    found = list(tensors_in({"a": [leaf, ({1: other}, None, "text")]}))
    assert leaf.grad is not None and [id(t) for t in found] == [id(leaf), id(leaf.grad), id(other)]


def test_what_is_small_stays() -> None:
    large, small = torch.ones(1 << 18), torch.ones((1 << 18) - 1)
    memory = Known([large, small])
    memory.smallest = DeviceMemory(torch.device("cpu")).smallest
    assert memory.offload() == 1 << 20
    assert small.sum() == small.numel()


def test_what_is_gone_meanwhile_is_not_filled_again() -> None:
    kept, dropped = torch.ones(1024), torch.ones(2048)
    memory = Known([kept, dropped])
    assert memory.offload() == 3072 * 4
    memory.reload()
    memory._tensors = [kept]
    assert memory.offload() == 4096 and len(memory._moved) == 1


def test_all_tensors_of_a_process_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that only a gradient or a list deep inside of something holds."""
    memory = DeviceMemory(torch.device("cpu"))
    model = nn.Linear(3, 3)
    model(torch.ones(3)).sum().backward()
    hidden = {"deep": [(torch.ones(7),)]}
    found = {tensor.data_ptr() for tensor in memory.held()}
    assert model.weight.grad is not None and hidden["deep"]
    wanted = [model.weight, model.weight.grad, hidden["deep"][0][0]]
    assert {tensor.data_ptr() for tensor in wanted} <= found
