"""What only torch can tell of a model that is to be trained; no weights are read.

The private functions run in the process that `raylign.boundary.beside.asked` asks: they import torch, the rest does
without.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from raylign.boundary.beside import asked
from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.config.losses import TrainerLoss
from raylign.config.losses.reward_model import RewardLossBase
from raylign.errors import ModelError
from raylign.models.remembered import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, its Jetson boards, AMD, and Linux inside Windows; without one of them there is no GPU."""


def require_models(loss: TrainerLoss, folder: str, reference: str, block: ModelBlock) -> Callable[[], None]:
    """Begin the check; what is returned raises ModelError unless the files fit.

    `folder` must have the weights that `loss` trains, and `reference` all of its own.
    """
    trained = "reward model" if isinstance(loss, RewardLossBase) else "policy"
    return remembered((folder, reference), block, trained, _require_models, loss, folder, reference, block)


def _require_models(loss: TrainerLoss, folder: str, reference: str, block: ModelBlock) -> None:
    from raylign.models.load import require_fit  # noqa: PLC0415
    from raylign.training.learners import require_learnable  # noqa: PLC0415

    require_learnable(loss, folder, block)
    if reference != folder:
        require_fit(reference, block.trust_remote_code)


def trained_parameters(folder: str, block: ModelBlock) -> int:
    """Parameters with gradients, counted on a model without storage. Raises ModelError as the trainer would."""
    return remembered((folder,), block, "", _trained_parameters, folder, block)()


def _trained_parameters(folder: str, block: ModelBlock) -> int:
    from raylign.training.logprobs import CompletionLogps  # noqa: PLC0415

    try:
        model = _without_storage(folder, block)
        CompletionLogps(model)
        if block.lora is not None:
            return adapter_parameters(model, block.lora)
    except ValueError as error:
        raise ModelError(f"{folder}: not a causal language model that can be trained so ({error})") from error
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameters(model: "PreTrainedModel", lora: LoraBlock) -> int:
    """Weights of the adapter that PEFT would add: r (inputs + outputs) for each layer it adapts.

    Raises ValueError where PEFT would: no layer of these names, or one that is no linear, Conv1D or embedding layer.
    """
    from torch import nn  # noqa: PLC0415
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    head = model.get_output_embeddings()
    if lora.target_modules == "all-linear":
        adapted = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    else:
        wanted = lora.target_modules
        adapted = [m for name, m in model.named_modules() if name and name.endswith(tuple(f".{w}" for w in wanted))]
        adapted += [m for name, m in model.named_modules() if name in wanted]
        if not adapted:
            raise ValueError(f"model.lora.target_modules={', '.join(wanted)}: the model has no layer of these names")
        if other := next((m for m in adapted if not isinstance(m, nn.Linear | Conv1D | nn.Embedding)), None):
            raise ValueError(f"model.lora.target_modules: {type(other).__name__} is no layer that LoRA adapts")
    return lora.r * sum(sum(module.weight.shape) for module in adapted)


def linear_parameters(folder: str, block: ModelBlock) -> int:
    """Weights of linear layers but the output head, counted on a model without storage."""
    return remembered((folder,), block, "", _linear_parameters, folder, block)()


def _linear_parameters(folder: str, block: ModelBlock) -> int:
    from torch import nn  # noqa: PLC0415
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    model = _without_storage(folder, block)
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return sum(module.weight.numel() for module in linear)


def gpus() -> int:
    """GPUs that torch can use here."""
    return asked(_gpus)() if any(map(os.path.exists, _GPU_DRIVERS)) else 0


def _gpus() -> int:
    import torch  # noqa: PLC0415

    return torch.cuda.device_count()


def _without_storage(folder: str, block: ModelBlock) -> "PreTrainedModel":
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from raylign.models.load import empty_model  # noqa: PLC0415
    from raylign.models.open import open_config  # noqa: PLC0415

    with torch.device("meta"):
        config = open_config(folder, block.trust_remote_code)
        return empty_model(AutoModelForCausalLM, config, block.trust_remote_code)
