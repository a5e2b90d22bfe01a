"""The strict base of every config block."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from raylign.reading import shown

Value = TypeVar("Value")
INT32 = (1 << 31) - 1
"""Counts, lengths and token ids are 32-bit integers to vLLM, torch and NCCL."""
FLOAT32 = (1.2e-38, 3.4e38)
"""Magnitudes that a float32 holds in full."""
SECONDS = 1e8
"""Three years; the clocks of the operating system hold no more than some hundred."""


class Block(BaseModel):
    """Frozen, no unknown keys, field docstrings kept as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def numbers_fit_what_they_become(cls, value: Value, info: ValidationInfo) -> Value:
        """Past these limits a number fails where it is used, minutes after the start. A field's own limit wins."""
        name = info.field_name or ""
        if any(hasattr(limit, "le") for limit in cls.model_fields[name].metadata):
            return value
        low, high = FLOAT32
        most = SECONDS if name.endswith("_s") else high
        for number in _numbers(value):
            if isinstance(number, int) and abs(number) > INT32:
                raise ValueError(f"{shown(number)} is more than {INT32:,}; give a smaller number")
            if isinstance(number, float) and number and not low <= abs(number) <= most:
                raise ValueError(f"{number:g} is not within {low:g} to {most:g}; give a number there, or 0")
        return value


def _numbers(value: object) -> Iterator[int | float]:
    """The number, or those of a list or mapping."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield part
