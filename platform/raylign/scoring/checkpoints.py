"""Checkpoints that scorers run: whole models, and PEFT adapters on their bases."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from raylign.config.blocks import ModelBlock
from raylign.config.scoring import ModelScoringBlock
from raylign.errors import ModelError, ScorerError
from raylign.export.policy import ADAPTER_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG, adapter_file, shapes
from raylign.models import resolve_model
from raylign.models.load import open_adapter
from raylign.models.resolve import check_facts, locate, read_facts, stored_shapes
from raylign.run.fingerprints import fingerprint, model_digest
from raylign.run.inputs import Input
from raylign.scoring.base import Compute

if TYPE_CHECKING:
    from peft import PeftModel

# What errors of models call the policy's options, or would call a scorer's.
_OF_SCORERS = {
    "model.chat_template": "scoring.chat_template",
    "model.trust_remote_code": "scoring.trust_remote_code",
    "reference.path": "scoring.reference_path",
    "scoring.policy.": "scoring.policy_",
    "scoring.reference.": "scoring.reference_",
}
_OPTION = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, _OF_SCORERS))})")
PLAIN = "a scorer loads the plain ones; give the 16-bit model"


@dataclass(frozen=True, slots=True)
class ScorerCheckpoint:
    """Where a model is. Made by `find_checkpoint`, read by the scorers that load it.

    `folders` are the base's folder, and the adapter's behind it if the model is an adapter.
    """

    folders: tuple[Path, ...]

    @property
    def base(self) -> str:
        return str(self.folders[0])

    @property
    def adapters(self) -> tuple[Path, ...]:
        """One folder, or none."""
        return self.folders[1:]

    @property
    def tokenizer(self) -> str:
        """The folder with the tokenizer: the adapter's own goes before its base's."""
        own = [folder for folder in self.folders if (folder / TOKENIZER_CONFIG).is_file()]
        return str([self.folders[0], *own][-1])

    def parameters(self) -> int:
        """Numbers in the files, by their headers alone."""
        return sum(math.prod(shape) for folder in self.folders for shape in stored_shapes(folder).values())


def find_checkpoint(path: str, revision: str | None, task: str, option: str = "scoring") -> ScorerCheckpoint:
    """What `path` names: a folder or hub id of a whole model, or of an adapter for PEFT's `task`, whose base is found.

    Raises ModelError naming `option`: nothing there, no safetensors, an adapter for another task, no base.
    """
    folder = locate(path, revision, option)
    if (folder / MODEL_CONFIG).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return ScorerCheckpoint((Path(resolve_model(path, revision, option)),))
    adapter_file(folder)
    check_facts(folder)
    config = read_facts(folder / ADAPTER_CONFIG)
    if config.get("task_type") != task:
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} has task_type={config.get('task_type')}, and {option}.path takes {task}; "
            "give an adapter of that task"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder}: {ADAPTER_CONFIG} names no base_model_name_or_path; add its base model's folder")
    try:
        found = resolve_model(base, config.get("revision"), option)
    except ModelError as error:
        raise ModelError(
            f"{folder}: its base, base_model_name_or_path in {ADAPTER_CONFIG}, cannot be used ({error}); correct it "
            "there, or give a merged model"
        ) from error
    return ScorerCheckpoint((Path(found), folder.resolve()))


def model_fingerprint(checkpoint: ScorerCheckpoint) -> str:
    """sha256 (hex) over weights, config, tokenizer, template and code of a checkpoint; it reads every byte of them."""
    return model_digest(*checkpoint.folders)


def model_block(block: ModelScoringBlock) -> ModelBlock:
    """What `raylign.models` asks of a model that is loaded to be run as it is."""
    return ModelBlock(dtype=block.dtype, trust_remote_code=block.trust_remote_code)


def adapted(model: nn.Module, adapter: Path) -> "PeftModel":
    """`model` under an adapter whose weights all have their place. Raises ModelError."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - takes seconds, and few need it

    stored = stored_shapes(adapter)
    found = open_adapter(model, adapter, autocast_adapter_dtype=False)
    # PEFT only warns of names that it cannot place.
    if differing := sorted(name for name, _ in stored.items() ^ shapes(get_peft_model_state_dict(found)).items()):
        raise ModelError(
            f"{adapter}: {len(differing)} of its {len(stored)} weights do not fit its base, first {differing[0]}; "
            "correct base_model_name_or_path in adapter_config.json"
        )
    return found


@contextmanager
def of_scorer() -> Iterator[None]:
    """Make a ModelError a ScorerError that names the scorer's options instead of the policy's."""
    try:
        yield
    except ModelError as error:
        raise ScorerError(_OPTION.sub(lambda found: _OF_SCORERS[found[0]], str(error))) from error


def device_of(compute: Compute) -> torch.device:
    """Where a scorer's model computes; this process computes on `threads` threads from here on."""
    torch.set_num_threads(compute.threads)
    return torch.device("cuda", 0) if compute.on_gpu else torch.device("cpu")


def hashes_of(checkpoints: Iterable[ScorerCheckpoint], block: ModelScoringBlock) -> list[str]:
    """Hashes (sha256, hex) of all that decides a score: each model's files, and the template of `block`."""
    hashes = [model_fingerprint(checkpoint) for checkpoint in checkpoints]
    return hashes if block.chat_template is None else [*hashes, fingerprint(block.chat_template).sha256]


def model_input(hashes: Sequence[str]) -> Input:
    """The models of a scorer as an input of the run."""
    return Input(hashlib.sha256("\n".join(hashes).encode()).hexdigest(), "files of the scorer's model", fixed=False)


def size_of(checkpoint: ScorerCheckpoint, block: ModelScoringBlock) -> str:
    return f"{checkpoint.parameters():,} parameters in {block.dtype}"


def places_of(checkpoint: ScorerCheckpoint) -> str:
    return " on ".join(str(folder) for folder in reversed(checkpoint.folders))


def template_of(block: ModelScoringBlock, checkpoint: ScorerCheckpoint) -> str:
    source = f"in {checkpoint.tokenizer}" if block.chat_template is None else f"file {Path(block.chat_template)}"
    return f"chat template {source}"
