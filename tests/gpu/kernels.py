"""Kernels against what transformers, PEFT and PyTorch compute: log-probs and every gradient, in fp32 and bf16.

In bf16 the exact values are those of the same weights in fp32, and ours may be twice as far from them as the plain
implementation in bf16 is.
"""

import copy
import time
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raylign.records import Completions
from raylign.training.kernels.adapted_linear import use_fused_adapters
from raylign.training.kernels.head import linear_scores
from raylign.training.kernels.rms_norm import use_lean_norms
from raylign.training.layout_check import supported_layout
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout, token_batch
from tests.gpu.stage import Stage, free, random_ids, random_model

_SHAPES = ((200, (300, 129)), (64, (65, 128, 1, 200)), (128, (16,) * 16), (5, (3, 40)))
"""Tokens of each prompt and of its completions: pairs, K=4, many short answers, and a prompt shorter than a window."""
_TINY_SHAPES = ((20, (30, 13)), (9, (30, 12, 1, 20)), (5, (3, 4)))
_EXACT_NATS, _EXACT_SHARE = 1e-4, 1e-4
"""fp32: of a log-prob, and of a gradient's length."""
_MORE = 2.0
"""Times the plain implementation's own error that ours may have in bf16."""
_FLOOR_NATS, _FLOOR_MEAN, _FLOOR_SHARE = 0.02, 0.002, 0.005
"""Added to that: for the worst token, for the mean over tokens, and for gradients."""
_MODELS = ("qwen3", "llama", "mistral")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LAYOUTS: tuple[Layout, ...] = ("shared", "packed")
_OURS = ("attention", "attn", "fold_kernel", "gradient_kernel")
"""Parts of the names of operations and kernels that say which way a pass took."""


def check(stage: Stage) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with stage.sheet.trying("varlen_attn"):
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every PyTorch

        stage.sheet.inform("varlen_attn of this PyTorch", note=", ".join(signature(varlen_attn).parameters))
    for name, dtype in _DTYPES.items():
        for kind in _MODELS:
            with stage.sheet.trying(f"{kind} {name}"):
                _check_model(stage, kind, name, dtype)
        for other, run in (("head", _check_head), ("adapted linear", _check_adapted), ("RMS norm", _check_norm)):
            with stage.sheet.trying(f"{other} {name}"):
                run(stage, name, dtype)
        free()
    with stage.sheet.trying("head's speed"):
        _time_head(stage)


def _check_model(stage: Stage, kind: str, name: str, dtype: torch.dtype) -> None:
    """One set of weights three times: exact in fp32, plain in `dtype` and eager, and ours."""
    vocabulary = 1009 if stage.tiny else 9001
    width = 64 if stage.tiny else 256
    model = random_model(kind, vocabulary=vocabulary, width=width)
    nn.Module.to(model, stage.device, dtype)
    exact, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    module = CompletionLogps(model)
    generator = torch.Generator().manual_seed(1)
    shapes = _TINY_SHAPES if stage.tiny else _SHAPES
    groups = [
        Completions(random_ids(generator, prompt, vocabulary), [random_ids(generator, n, vocabulary) for n in lengths])
        for prompt, lengths in shapes
    ]
    shares = torch.randn(sum(sum(lengths) for _, lengths in shapes), generator=generator).to(stage.device)
    wanted = _values(exact, groups, shares)
    beside = _values(plain, groups, shares) if dtype != torch.float32 else wanted
    layout = supported_layout([module], "shared", stage.device)
    stage.sheet.require(f"{kind} {name}: the layout check keeps shared rows", layout == "shared", "at least", 1)
    for layout in _LAYOUTS:
        ways, found = _watched(stage, lambda layout=layout: _our_values(module, groups, layout, shares))  # type: ignore[misc]
        nats = [float((values[0] - wanted[0]).abs().max()) for values in (found, beside)]
        limit = _EXACT_NATS if dtype == torch.float32 else _MORE * nats[1] + _FLOOR_NATS
        what = f"{kind} {name} {layout}"
        stage.sheet.require(f"{what}: log-probs from eager", nats[0], "at most", limit, "nats", f"by {ways}")
        _require_near(stage, f"{what}: gradients from eager", (found[1], beside[1], wanted[1]), dtype)


def _values(model: PreTrainedModel, groups: Sequence[Completions], shares: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of all completion tokens, each row alone through the logits; the gradient of their weighted sum."""
    device = shares.device
    parts = []
    for group in groups:
        for ids in group.completions:
            logits = model(input_ids=torch.tensor([[*group.prompt, *ids]], device=device)).logits[0]
            labels = torch.tensor(ids, device=device)[:, None]
            parts.append(logits[len(group.prompt) - 1 : -1].float().log_softmax(-1).gather(1, labels)[:, 0])
    logps = torch.cat(parts)
    (logps * shares).sum().backward()  # type: ignore[no-untyped-call]
    return logps.detach(), _gradients(model)


def _our_values(
    module: CompletionLogps, groups: Sequence[Completions], layout: Layout, shares: Tensor
) -> tuple[Tensor, Tensor]:
    logps = module(token_batch(groups, layout, 0).to(shares.device)).tokens.logps
    (logps * shares).sum().backward()
    return logps.detach(), _gradients(module)


def _gradients(model: nn.Module) -> Tensor:
    """All of them in one row, and none left behind."""
    found = [parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def _watched(stage: Stage, run: Callable[[], Any]) -> tuple[str, Any]:
    """Which attention and head ran, by the names of their operations and kernels, and the result."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if stage.on_gpu else [])]
    with profile(activities=activities) as seen:
        result = run()
    names = {event.key for event in seen.key_averages() if any(part in event.key for part in _OURS)}
    short = {name.removeprefix("aten::").strip("_") for name in names if "backward" not in name.lower()}
    return ", ".join(sorted(name[:60] for name in short)) or "eager operations", result


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _require_near(stage: Stage, what: str, values: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    """`values` are ours, the plain ones in `dtype` and the exact ones."""
    ours, plain = (_distance(value, values[2]) for value in values[:2])
    limit = _EXACT_SHARE if dtype == torch.float32 else _MORE * plain + _FLOOR_SHARE
    stage.sheet.require(what, ours, "at most", limit, "of its length")


def _check_head(stage: Stage, name: str, dtype: torch.dtype) -> None:
    tokens, width, vocabulary = (300, 32, 5003) if stage.tiny else (3000, 512, 20011)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5 * 3
    given = [part.to(stage.device, dtype) for part in (hidden, weight, torch.randn(vocabulary, generator=generator))]
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(stage.device)
    of_logps, of_entropies = torch.randn(2, tokens, generator=generator).to(stage.device)

    def scored(score: Callable[..., Sequence[Tensor]], wide: torch.dtype) -> tuple[list[Tensor], Tensor]:
        inputs = [part.detach().to(wide, copy=True).requires_grad_() for part in given]
        scores = score(*inputs, labels)
        (scores[0] * of_logps + scores[1] * of_entropies).sum().backward()
        return [part.detach() for part in scores], torch.cat([_grad(part).flatten().double() for part in inputs])

    ways, found = _watched(stage, lambda: scored(linear_scores, dtype))
    exact, plain = scored(_plain_scores, torch.float64), scored(_plain_scores, dtype)
    columns = ("log-probs", "entropies", "likeliest", "mean logits", "collisions")
    for column, *parts in zip(columns, found[0], plain[0], exact[0], strict=True):
        ours, beside = (float((part.double() - parts[2].double()).abs().mean()) for part in parts[:2])
        limit = _EXACT_NATS if dtype == torch.float32 else _MORE * beside + _FLOOR_MEAN
        stage.sheet.require(f"head {name}: {column} from log_softmax, mean", ours, "at most", limit, "", f"by {ways}")
    _require_near(stage, f"head {name}: gradients from log_softmax", (found[1], plain[1], exact[1]), dtype)


def _time_head(stage: Stage) -> None:
    """Forward and backward as a step on Qwen3-1.7B has them; the backward pass computes the logits again."""
    tokens, width, vocabulary = (64, 16, 5003) if stage.tiny else (6144, 2048, 151936)
    hidden = torch.randn(tokens, width, device=stage.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=stage.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(tokens, device=stage.device)
    seconds = 0.0
    for _ in range(3):
        _wait(stage)
        started = time.perf_counter()
        linear_scores(hidden, weight, None, labels).logps.sum().backward()  # type: ignore[no-untyped-call]
        _wait(stage)
        seconds = time.perf_counter() - started
    rate = 8 * tokens * width * vocabulary / seconds / 1e12
    what = f"head bf16, {tokens} tokens of {width}, {vocabulary} entries, forward and backward"
    stage.sheet.inform(what, rate, "TFLOP/s", f"{1e3 * seconds:.1f} ms")


def _wait(stage: Stage) -> None:
    if stage.on_gpu:
        torch.cuda.synchronize()


def _plain_scores(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What `raylign.training.kernels.head.TokenScores` holds, over all logits at once."""
    given = nn.functional.linear(hidden, weight, bias)
    logits = given if given.dtype == torch.float64 else given.float()
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(1, labels[:, None])[:, 0]
    likeliest = (logps >= log_p.amax(1)).float()
    return logps, -(log_p.exp() * log_p).sum(1), likeliest, logits.mean(1), (2 * log_p).logsumexp(1)


def _check_adapted(stage: Stage, name: str, dtype: torch.dtype) -> None:
    """A LoRA layer whose second matrix is not zero, as after a step, against PEFT's own forward."""
    model = random_model("llama", vocabulary=101, width=64 if stage.tiny else 512, layers=1)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))
    adapted = adapted.to(stage.device, dtype)
    layer: Any = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    generator = torch.Generator().manual_seed(3)
    up = layer.lora_B["default"].weight
    up.data.copy_(torch.randn(up.shape, generator=generator) * 0.1)
    given = torch.randn(1, 300, layer.in_features, generator=generator).to(stage.device, dtype)
    exact = _through(copy.deepcopy(layer).float(), given.float())
    plain = _through(copy.deepcopy(layer), given)
    use_fused_adapters(adapted)
    replaced = "forward" in vars(layer)
    stage.sheet.require(f"adapted linear {name}: ours takes the layer", replaced, "at least", 1)
    found = _through(layer, given)
    for what, *parts in zip(("outputs", "gradients"), found, plain, exact, strict=True):
        _require_near(stage, f"adapted linear {name}: {what} from PEFT's", (parts[0], parts[1], parts[2]), dtype)


def _check_norm(stage: Stage, name: str, dtype: torch.dtype) -> None:
    width = 64 if stage.tiny else 2048
    generator = torch.Generator().manual_seed(4)
    norm = LlamaRMSNorm(width).to(stage.device, dtype)
    norm.weight.data.copy_(torch.randn(width, generator=generator))
    given = (3 * torch.randn(1, 500, width, generator=generator)).to(stage.device, dtype)
    exact, plain = _through(copy.deepcopy(norm).float(), given.float()), _through(copy.deepcopy(norm), given)
    use_lean_norms(norm)
    found = _through(norm, given)
    for what, *parts in zip(("outputs", "gradients"), found, plain, exact, strict=True):
        _require_near(stage, f"RMS norm {name}: {what} from transformers'", (parts[0], parts[1], parts[2]), dtype)


def _through(layer: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradients of input and weights for a fixed weighted sum of them."""
    start = given.detach().clone().requires_grad_()
    output = layer(start)
    shares = torch.linspace(-1, 1, output.numel(), device=given.device).view_as(output)
    (output.float() * shares).sum().backward()
    return output.detach(), torch.cat([_grad(start).flatten().double(), _gradients(layer)])


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
