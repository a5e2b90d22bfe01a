"""What a run of a recipe reads, by its contents: it goes on only with the same."""

from pathlib import Path

from raylign.config import OfflineConfig, OfflineDpoConfig, OnlineDpoConfig, RunConfig
from raylign.config.reference import ModelReferenceBlock
from raylign.run.fingerprints import fingerprint, model_digest
from raylign.run.inputs import Input, Rows, rows_digest
from raylign.scoring.identity import scorer_inputs


def inputs_of(config: RunConfig, rows: Rows, *, model: str, reference: str, recipe: str | None) -> dict[str, Input]:
    """By name: the rows, the folders `model` and `reference` where the config names one, the template, the file
    `recipe` with the loop (None: unknown), and what the scorer reads.
    """
    found = {
        "model.path": Input(model_digest(Path(model)), f"files of the model's folder {model}", fixed=True),
        _rows_name(config): Input(rows_digest(rows), "rows of the data, or how the template writes them", fixed=True),
    }
    if config.model.chat_template is not None:
        own = fingerprint(config.model.chat_template).sha256
        found["model.chat_template"] = Input(own, f"the template {config.model.chat_template}", fixed=True)
    if isinstance(config, OnlineDpoConfig | OfflineDpoConfig) and isinstance(config.reference, ModelReferenceBlock):
        own = model_digest(Path(reference))
        found[f"reference.path={config.reference.path}"] = Input(own, "files of the reference's folder", fixed=False)
    if recipe is not None:
        found["recipe"] = Input(fingerprint(Path(recipe)).sha256, f"the recipe's own code, {recipe}", fixed=False)
    if isinstance(config, OnlineDpoConfig):
        found |= dict(scorer_inputs(config.scoring))
    return found


def _rows_name(config: RunConfig) -> str:
    return "data.source" if isinstance(config, OfflineConfig) else "prompts.source"
