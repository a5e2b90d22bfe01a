"""Which combinations of ZeRO stage, dtype and way of training there are to check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["full", "LoRA", "NF4", "checkpointing", "offload"]
Dtype = Literal["float32", "bfloat16", "float16"]
_LORA = {"r": 8, "lora_alpha": 16}
MODELS: Mapping[Way, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": _LORA},
    "NF4": {"lora": _LORA, "load_in_4bit": True},
    "checkpointing": {},
    "offload": {},
}
TRAINERS: Mapping[Way, dict[str, Any]] = {
    "full": {},
    "LoRA": {},
    "NF4": {},
    "checkpointing": {"gradient_checkpointing": True},
    "offload": {"offload": {"optimizer": True}},
}


@dataclass(frozen=True, slots=True)
class Case:
    stage: int
    dtype: Dtype
    way: Way

    def __str__(self) -> str:
        return f"ZeRO {self.stage} {self.dtype} {self.way}"


def cases(stages: Sequence[int], dtypes: Sequence[Dtype], ways: Sequence[Way]) -> list[Case]:
    """What raylign's configuration takes: 4-bit weights are not sharded, and stage 0 offloads nothing."""
    found = [Case(stage, dtype, way) for dtype in dtypes for way in ways for stage in stages]
    return [
        case
        for case in found
        if not (case.way == "NF4" and case.stage == 3) and not (case.way == "offload" and case.stage == 0)
    ]


ALL = cases((0, 2, 3, 1), ("bfloat16", "float32", "float16"), ("full", "LoRA", "NF4", "checkpointing", "offload"))
TINY = [
    Case(0, "bfloat16", "full"),
    Case(2, "float32", "LoRA"),
    Case(3, "float32", "full"),
    Case(0, "float32", "NF4"),
    Case(1, "float32", "offload"),
]
