"""The strict base of every config block."""

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """Frozen, no unknown keys, field docstrings kept as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
