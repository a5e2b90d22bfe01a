"""The README.md of an exported reward model, in the Hugging Face format."""

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from raylign.export.card import code_span, hub_id


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
    return f"---\n{metadata.to_yaml()}\n---\n\n{_body(facts)}"


def _body(facts: RewardModelFacts) -> str:
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
