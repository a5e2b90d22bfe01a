"""What a trainer rank and an engine hold in the memory of a device, worked out from shapes and settings alone.

Of P weights, t of them trained (an adapter's, or all), in a dtype of b bytes, over r ranks; s is r where the row's ZeRO
stage shares it out, else 1:

    weights       frozen P b (4 bits a weight and its constants in linear layers under model.load_in_4bit), adapter t b;
                  shared out at stage 3
    fp32 masters  4 t / s, from stage 1 on; 0 in float32 at stage 0, where weights are their own
    moments       8 t / s, from stage 1 on
    gradients     4 t / s, fp32 sums, from stage 2 on; 2 t beside them at stage 1 in bfloat16
    activations   T (layers x A + 2 hidden) b, kept for the backward pass of T tokens, with
                  A = 4 hidden + 2 (queries + keys) + 4 inner: inputs of norms and linear layers; queries, keys, values
                  and output of attention; gate, its activation, up, and their product; norms of heads add queries
                  + keys; transformers' norms on GPUs keep fp32 copies of their input. Checkpointing keeps
                  layers x hidden, and one A
    buffers       what comes and goes: the head's tiles, the gradients of a layer, DeepSpeed's bucket, and of stage 3
                  the gathered weights

T is trainer.max_tokens_per_micro_batch, or what all preferences of a micro-batch have at most, or one longest sequence:
larger preferences run in pieces. With offload.optimizer masters, moments and gradient sums are in host memory, with
offload.param the weights. All rows but buffers are held within 20 % of what tensors and autograd say, on CPUs: at
stage 0 (tests/unit/training/test_memory.py), and what stays between two steps within 5 % at every stage
(tests/integration/test_trainer_state.py). An engine holds P b / tensor_parallel_size, its context, and a KV cache of
2 layers x keys x b bytes a token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig

from raylign.config.blocks import ModelBlock, OffloadBlock, TrainerBlock

GIB = 1 << 30
_FP32 = 4
_MOMENTS = 2
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a constant in bitsandbytes' 4-bit storage, and constants that share one of their own."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`, where so many are trained."""
LIVE = 1_000_000_000
"""Elements of DeepSpeed's `stage3_max_live_parameters`."""
_TILES = {"cpu": 512 * 4096, "gpu": 2048 * 8192}
"""Logits of a tile of the head."""
_COPIES = 4
"""Of a tile, in fp32, at a time."""
_AVERAGED = 64 << 20
"""Bytes of gradients that ranks without ZeRO add up at a time."""
CURES = 3
"""Settings that are named where something does not fit."""
_RANK = 16
"""Of the adapter that is named among them."""

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A causal language model in numbers. Made by `size_of`.

    `linear` are the weights of its linear layers but the head, `sides` the inputs and outputs of these added up, which
    an adapter of rank 1 has as weights. `queries` and `keys` are the widths of all heads together.
    """

    parameters: int
    linear: int
    sides: int
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    head_norms: bool

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values of a token."""
        return 2 * self.layers * self.keys * itemsize


def size_of(shapes: Mapping[str, Sequence[int]], config: PreTrainedConfig) -> ModelSize:
    """From the shapes of the weights by name, a tied output head left out, and config.json."""
    text = config.get_text_config()
    hidden, heads = _width(text, "hidden_size"), _width(text, "num_attention_heads") or 1
    wide = _width(text, "head_dim") or hidden // heads
    matrices = [shape for shape in shapes.values() if len(shape) == 2 and text.vocab_size not in shape]
    return ModelSize(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        linear=sum(math.prod(shape) for shape in matrices),
        sides=sum(sum(shape) for shape in matrices),
        layers=_width(text, "num_hidden_layers"),
        hidden=hidden,
        inner=_inner(text, hidden),
        queries=heads * wide,
        keys=(_width(text, "num_key_value_heads") or heads) * wide,
        head_norms=any("q_norm" in name for name in shapes),
    )


def _inner(text: PreTrainedConfig, hidden: int) -> int:
    """Width inside the feed-forward layers that a token passes: of all its experts, where it has some."""
    experts = _width(text, "num_experts_per_tok") * _width(text, "moe_intermediate_size")
    plain = (_width(text, name) for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
    return experts or next((width for width in plain if width), 4 * hidden)


def _width(text: PreTrainedConfig, name: str) -> int:
    """The widest of all layers; 0 where the architecture has another name for it, or none."""
    found = getattr(text, name, None)
    widths = found if isinstance(found, list | tuple) else [found]
    return max((width for width in widths if isinstance(width, int)), default=0)


def frozen_bytes(parameters: int, linear: int, block: ModelBlock) -> int:
    """Of a model as a trainer holds it: in `block.dtype`, linear layers in 4 bits where the block says so."""
    packed = linear if block.load_in_4bit else 0
    constant = 8 / _BLOCK + 32 / (_BLOCK * _NESTED_BLOCK) if block.use_bnb_nested_quant else 32 / _BLOCK
    return math.ceil((parameters - packed) * block.itemsize + packed * (4 + constant) / 8)


@dataclass(frozen=True, slots=True)
class TrainerNeeds:
    """A trainer rank, from which its memory follows; `reference` are the bytes of the reference.

    Sequences have up to `longest` tokens, preferences up to `candidates` of them, or any number where it is None.
    """

    size: ModelSize
    trained: int
    model: ModelBlock
    trainer: TrainerBlock
    longest: int
    candidates: int | None
    reference: int
    device: Device

    @property
    def tokens(self) -> int:
        """T: tokens of a forward pass with a graph, at most."""
        limit, block = self.trainer.max_tokens_per_micro_batch, self.trainer
        if self.candidates is not None:
            limit = min(limit, block.per_device_train_batch_size * self.candidates * self.longest)
        return max(limit, self.longest)

    def rows(self) -> dict[str, int]:
        """Bytes on the device while it trains."""
        stage, ranks = self._stage, self.trainer.ranks
        host = self.trainer.offload.optimizer
        masters = 0 if stage == 0 and self.model.dtype == "float32" else _FP32 * self.trained
        shared = ranks if stage else 1
        return {
            "weights": 0 if self.trainer.offload.param else self._weights(),
            "fp32 masters": 0 if host else _share(masters, shared),
            "moments": 0 if host else _share(_MOMENTS * _FP32 * self.trained, shared),
            "gradients": 0 if host else self._gradients(),
            "activations": self._activations(),
            "buffers": self._buffers(),
            "reference": self.reference,
        }

    def host(self) -> int:
        """Bytes in host memory that offloading took off the device."""
        kept = replace(self, trainer=self.trainer.model_copy(update={"offload": OffloadBlock()}))
        with_all, without = kept.rows(), self.rows()
        return sum(with_all[row] - without[row] for row in ("weights", "fp32 masters", "moments", "gradients"))

    @property
    def total(self) -> int:
        return sum(self.rows().values())

    @property
    def _stage(self) -> int:
        """DeepSpeed has the loss scale of float16, and not for its stage 0."""
        return max(self.trainer.zero_stage, 1 if self.model.dtype == "float16" else 0)

    def _weights(self) -> int:
        adapter = self.trained * self.model.itemsize if self.model.lora is not None else 0
        whole = frozen_bytes(self.size.parameters, self.size.linear, self.model) + adapter
        return _share(whole, self.trainer.ranks if self._stage == 3 else 1)

    def _gradients(self) -> int:
        sums = _share(_FP32 * self.trained, self.trainer.ranks if self._stage >= 2 else 1)
        return sums + (2 * self.trained if self._stage == 1 and self.model.dtype == "bfloat16" else 0)

    def _activations(self) -> int:
        size, itemsize = self.size, self.model.itemsize
        layer = 4 * size.hidden + 2 * (size.queries + size.keys) + 4 * size.inner
        normed = 2 * size.hidden
        if size.head_norms:
            layer, normed = layer + size.queries + size.keys, normed + size.queries + size.keys
        # transformers' own norms keep an fp32 copy in place of the input, and a narrow one for a trained weight.
        wide = (_FP32 - itemsize) + (0 if self.model.lora else itemsize)
        of_layer = layer * itemsize + (normed * wide if self.device == "gpu" and itemsize < _FP32 else 0)
        inputs = size.hidden * itemsize
        kept = size.layers * inputs + of_layer if self.trainer.gradient_checkpointing else size.layers * of_layer
        return self.tokens * (kept + 2 * inputs)

    def _buffers(self) -> int:
        stage, itemsize = self._stage, self.model.itemsize
        layer = self.tokens * 2 * (self.size.inner + self.size.hidden) * itemsize
        found = _COPIES * _FP32 * _TILES[self.device] + layer
        if stage == 0:
            return found + (min(_AVERAGED, _FP32 * self.trained) if self.trainer.ranks > 1 else 0)
        if stage == 1 and self.model.dtype == "bfloat16" and not self.trainer.offload.optimizer:
            return found
        buckets = 2 if stage == 2 and self.device == "gpu" else 1  # one is on its way while the other fills
        bucket = buckets * min(BUCKET, self.trained) * (_FP32 if stage == 1 else itemsize)
        return found + bucket + (min(self.size.parameters, LIVE) * itemsize if stage == 3 else 0)


def _share(whole: int, ranks: int) -> int:
    return math.ceil(whole / ranks)


@dataclass(frozen=True, slots=True)
class Cure:
    """A setting, and the bytes of the device that it would free."""

    setting: str
    frees: int

    def __str__(self) -> str:
        return f"{self.setting} ({self.frees / GIB:.2g} GiB less)"


def trainer_cures(needs: TrainerNeeds) -> list[Cure]:
    """The settings of model and trainer that would free most on each device, the best first, at most three."""
    found = [Cure(setting, needs.total - other.total) for setting, other in _tries(needs).items()]
    return sorted((cure for cure in found if cure.frees > 0), key=lambda cure: -cure.frees)[:CURES]


def _tries(needs: TrainerNeeds) -> dict[str, TrainerNeeds]:
    """By setting: what a rank would need with it."""
    model, trainer = needs.model, needs.trainer
    more = max(2, 2 * trainer.ranks)

    def changed(**options: object) -> TrainerNeeds:
        return replace(needs, trainer=trainer.model_copy(update=options))

    tries = {
        "trainer.gradient_checkpointing=true": changed(gradient_checkpointing=True),
        f"trainer.max_tokens_per_micro_batch={_half(needs.tokens)}": changed(
            max_tokens_per_micro_batch=_half(needs.tokens)
        ),
    }
    if model.lora is None:
        adapter = ModelBlock.model_validate(model.model_dump() | {"lora": {"r": _RANK}})
        tries[f"model.lora.r={_RANK}"] = replace(needs, model=adapter, trained=_RANK * needs.size.sides)
    elif trainer.zero_stage < 3:
        tries["model.load_in_4bit=true"] = replace(needs, model=model.model_copy(update={"load_in_4bit": True}))
    if trainer.zero_stage == 3:
        tries[f"trainer.ranks={more}"] = changed(ranks=more)
    elif not model.load_in_4bit:
        ranks = trainer.ranks if trainer.ranks > 1 else more
        beside = "" if trainer.ranks > 1 else f" with trainer.ranks={more}"
        tries[f"trainer.zero_stage=3{beside}"] = changed(zero_stage=3, ranks=ranks)
    offload = trainer.offload.model_copy(update={"optimizer": True})
    stage, beside = (trainer.zero_stage, "") if trainer.zero_stage else (2, " with trainer.zero_stage=2")
    tries[f"trainer.offload.optimizer=true{beside}"] = changed(offload=offload, zero_stage=stage)
    return tries


def _half(tokens: int) -> int:
    return max(1, tokens // 2)
