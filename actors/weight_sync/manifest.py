"""What a model's weights must look like: names and shapes, read from safetensors headers alone."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from raylign.errors import WeightSyncError
from raylign.reading.files import read_text
from raylign.reading.json_text import ANY_INTEGER, parse_json

Manifest = Mapping[str, tuple[int, ...]]
_SHOWN = 3


def file_manifest(path: Path) -> Manifest:
    """Name -> shape of every tensor in one safetensors file."""
    with safe_open(path, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def checkpoint_manifest(folder: Path) -> Manifest:
    """Name -> shape over all safetensors files of a model folder; a tied output head is left out."""
    manifest = {
        name: shape for path in sorted(folder.glob("*.safetensors")) for name, shape in file_manifest(path).items()
    }
    if parse_json(read_text(folder / "config.json"), ANY_INTEGER).get("tie_word_embeddings", False):
        manifest.pop("lm_head.weight", None)
    return manifest


def require_same(expected: Manifest, found: Manifest) -> None:
    """Raises WeightSyncError naming missing, unknown and wrong-shaped tensors; call it before the engine is touched."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} has shape {list(found[name])}, the model has {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    parts = [_some("missing", missing), _some("unknown", unknown), _some("wrong shape", wrong)]
    problems = "; ".join(part for part in parts if part)
    if problems:
        raise WeightSyncError(
            f"weight push refused, nothing was changed: {problems}. "
            "Trainer and generators must load the same model.path and model.revision"
        )


def _some(label: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{label}: {', '.join(items[:_SHOWN])}{more}"
