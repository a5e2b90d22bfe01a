"""Whose answers an evaluation compares: a run's policy, a model, or answers that somebody has given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylign.config import EvaluateConfig
from raylign.config.blocks import ModelBlock
from raylign.config.evaluate import AnswersSideBlock, ModelSideBlock, RunSideBlock, Side
from raylign.errors import ConfigError
from raylign.models import load_tokenizer, require_context, resolve_model
from raylign.prompts import PromptSet, load_all, refused_path
from raylign.prompts.answers import given_answers
from raylign.records import Candidate
from raylign.run.directory import open_run
from raylign.run.fingerprints import model_digest
from raylign.run.inputs import Input, rows_input

POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Found:
    """One side, checked. `folder` is its model's, with the weights in `checkpoint` if there is one.

    `prompts` are in its own template's tokens, their ids the same for all sides; `given` are its answers where nobody
    samples them, and its model is then that of the tokenizer alone: the policy's, or the one of the config.
    """

    name: str
    told: str
    folder: str
    model: ModelBlock
    checkpoint: Path | None
    version: int
    prompts: PromptSet
    given: tuple[Candidate, ...] | None = None

    @property
    def contents(self) -> str:
        """What its answers depend on besides the prompts."""
        return model_digest(Path(self.folder)) + (model_digest(self.checkpoint) if self.checkpoint else "")


def find_sides(config: EvaluateConfig, *, quarantine: bool = True) -> list[Found]:
    """The policy, then its opponents. Raises RaylignError, naming the cure, when one of them could not answer.

    Bad rows of the prompts are written to the run's quarantine unless told otherwise.
    """
    blocks: Mapping[str, Side] = {POLICY: config.policy, **config.opponents}
    sides: list[Found] = []
    for name, block in blocks.items():
        sides.append(_find(name, block, config, quarantine, sides[0] if sides else None))
    first, *others = sides
    for side in others:
        if side.told == first.told:
            raise ConfigError(
                f"opponents.{side.name} is the policy itself ({side.told}): half of the wins, whatever they are; name "
                "another one"
            )
        if _asked(side) != _asked(first):
            raise ConfigError(
                f"opponents.{side.name} ({side.told}) takes {len(_asked(side))} prompts, and the policy "
                f"({first.told}) {len(_asked(first))}: some are too long for one of them; raise "
                "generators.max_model_len, or leave those rows out"
            )
    return sides


def in_turn(sides: Sequence[Found]) -> list[int]:
    """The numbers of the sides in the order they answer.

    Those of one model come together, and the model as it is before its checkpoints: so they share its engines.
    """
    models = [(side.folder, side.model) for side in sides]
    return sorted(
        range(len(sides)), key=lambda number: (models.index(models[number]), sides[number].checkpoint is not None)
    )


def _asked(side: Found) -> list[str]:
    return [prompt.id for prompt in side.prompts.held_out]


def _find(name: str, block: Side, config: EvaluateConfig, quarantine: bool, policy: Found | None) -> Found:
    match block:
        case RunSideBlock():
            return _of_run(name, block, config, quarantine)
        case ModelSideBlock():
            option = POLICY if name == POLICY else f"opponents.{name}"
            folder = resolve_model(block.path, block.revision, option)
            told = f"{block.path}{f' at {block.revision}' if block.revision else ''}"
            _, prompts = _read(folder, config.model, config, quarantine)
            return Found(name, told, folder, config.model, None, 0, prompts)
        case AnswersSideBlock():
            folder = policy.folder if policy else resolve_model(config.model.path)
            model = policy.model if policy else config.model
            if policy:
                tokenizer, prompts = _tokenizer(folder, model), policy.prompts
            else:
                tokenizer, prompts = _read(folder, model, config, quarantine)
            given = tuple(given_answers(block, prompts.held_out, tokenizer))
            told = f"answers in column {block.column!r} of {block.source or config.prompts.source}"
            return Found(name, told, folder, model, None, 0, prompts, given)


def _of_run(name: str, block: RunSideBlock, config: EvaluateConfig, quarantine: bool) -> Found:
    directory = open_run(block.run)
    own = directory.config()
    if own.trains_rewards or isinstance(own, EvaluateConfig):
        raise ConfigError(f"{directory.path} has no policy: it is a run of the recipe {own.recipe}; name another run")
    folder = resolve_model(own.model.path, own.model.revision)
    checkpoint, version = None, 0
    if block.version != 0:
        version = directory.finished_round(block.version).policy_version
        checkpoint = directory.whole_checkpoint(version).folder
        if own.model.load_in_4bit:
            raise ConfigError(
                f"{directory.path}: its adapter was trained on a base in 4 bits, which vLLM does not serve; export it "
                f"(raylign export {directory.path} --to DIR --merge), then {{type: model, path: DIR}}"
            )
    _, prompts = _read(folder, own.model, config, quarantine)
    return Found(name, f"version {version} of {directory.path}", folder, own.model, checkpoint, version, prompts)


def _read(
    folder: str, model: ModelBlock, config: EvaluateConfig, quarantine: bool
) -> tuple[PreTrainedTokenizerBase, PromptSet]:
    """The prompts as the model in `folder` reads them."""
    require_context(*config.longest, folder, model)
    tokenizer = _tokenizer(folder, model)
    refused_to = refused_path(config.run) if quarantine else None
    block, most = config.prompts.rows, config.prompts.max_prompts
    return tokenizer, load_all(block, tokenizer, config.max_prompt_tokens, most=most, refused_to=refused_to)


def _tokenizer(folder: str, model: ModelBlock) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, model.trust_remote_code, model.chat_template)


def side_inputs(sides: Sequence[Found], option: str) -> dict[str, Input]:
    """What an evaluation reads of its sides: it goes on only with the same."""
    return {option: rows_input(sides[0].prompts)} | {
        side.name: Input(side.contents, f"files of {side.name}: {side.told}", fixed=True) for side in sides
    }
