"""What only torch and raylign.models can tell, as JSON: `python -m recipes.commands.checks.probe`.

A process of its own, because a broken torch can end its process without an exception.
"""

import json
import sys
from importlib.util import find_spec

from raylign.boundary.imports import lean_imports
from raylign.errors import ModelError

with lean_imports("torch"):
    from raylign.models.cache import MANIFEST, cache_root
    from raylign.models.embedded import EMBEDDED, PREFIX, carried_file


def main() -> None:
    import torch  # noqa: PLC0415 - beside it transformers would load its models

    models = {f"{PREFIX}{name}": _embedded(name) for name in EMBEDDED}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    json.dump({"gpus": gpus, "cuda": torch.version.cuda, "cache": str(cache_root()), "models": models}, sys.stdout)


def _embedded(name: str) -> tuple[str, str]:
    """(where the model is, why it is nowhere); one of the two is empty."""
    folder = cache_root() / "models" / name
    if (folder / MANIFEST).is_file():
        return f"made, in {folder}", ""
    if find_spec("gguf") is None:
        return "", "gguf, which reads the model's file, is not installed; pip install gguf"
    try:
        return f"in {carried_file(EMBEDDED[name]).name}; made at first use, some 10 s", ""
    except ModelError as error:
        return "", str(error)


if __name__ == "__main__":
    main()
