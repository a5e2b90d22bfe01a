"""Scores of reward models of a few thousand weights, against plain forward passes of transformers."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from raylign.config.blocks import ModelBlock
from raylign.config.scoring import RewardModelScoringBlock
from raylign.errors import ScorerError
from raylign.export.card import RewardModelFacts
from raylign.export.reward_model import export_reward_model
from raylign.models.reward_model import load_reward_model
from raylign.records import Completions, Prompt
from raylign.scoring.base import ScoringItem
from raylign.scoring.load import describe_scorer, load_scorer
from raylign.scoring.reward_model import RewardModelScorer, model_hashes
from raylign.training.rewards import CompletionRewards
from raylign.training.sequences import token_batch
from raylign.training.weights import checkpoint_weights
from tests.unit.tiny_models import SMALL, tiny
from tests.unit.training.test_weights import whole

WORDS = ["<unk>", "<pad>", "</s>", "user", "assistant", "say", "good", "bad", "film", "one", "two", "\n"]
PAD, EOS = 1, 2
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
TEXTS = ["good", "bad film", "one two one two good film", "", "two good", "bad bad bad"]
CPU = torch.device("cpu")


def save_tokenizer(folder: Path, template: str | None = TEMPLATE, **special: str) -> None:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "</s>", "unk_token": "<unk>"} | special
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def spread(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)


def save_reward_model(
    folder: Path, *, labels: int = 1, template: str | None = TEMPLATE, side: str = "right", **config: Any
) -> Path:
    torch.manual_seed(0)
    options = {"pad_token_id": PAD, "num_labels": labels, "max_position_embeddings": 64, **config}
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, **options))
    spread(model)
    model.save_pretrained(folder)
    save_tokenizer(folder, template, pad_token="<pad>", padding_side=side)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


def scorer(path: Path, **options: Any) -> RewardModelScorer:
    block = {"type": "reward_model", "path": str(path), "dtype": "float32", "max_unscored": 1.0, **options}
    return RewardModelScorer(RewardModelScoringBlock.model_validate(block), CPU)


def items(*texts: str) -> list[ScoringItem]:
    prompt = Prompt("p", ({"role": "user", "content": "say"},), (99,))
    return [ScoringItem(prompt, text) for text in texts]


def values(found: RewardModelScorer, *texts: str) -> list[float | None]:
    return [score.value for score in found.score(items(*texts))]


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in f"user say </s> assistant {text} </s>".split()]


def plain(path: Path, rows: Sequence[Sequence[int]]) -> list[float]:
    """What transformers gives for each row alone."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


def test_rewards_are_those_of_a_plain_forward_pass_however_they_are_batched(folder: Path) -> None:
    expected = plain(folder, [ids_of(text) for text in TEXTS])
    assert len({round(value, 3) for value in expected}) == len(TEXTS)
    assert values(scorer(folder), *TEXTS) == pytest.approx(expected, abs=1e-5)
    assert values(scorer(folder, batch_size=1), *TEXTS) == pytest.approx(expected, abs=1e-5)
    assert values(scorer(folder, max_tokens_per_batch=20), *TEXTS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", [None, -1, EOS])
def test_whatever_the_pad_token_batches_score_as_single_ones(tmp_path: Path, pad: int | None) -> None:
    """Without one, transformers reads at the last token; where it ends the answer, one before that."""
    path = save_reward_model(tmp_path, pad_token_id=pad, side="left")
    expected = plain(path, [ids_of(text) for text in TEXTS])
    assert values(scorer(path), *TEXTS) == pytest.approx(expected, abs=1e-5)
    assert (expected == pytest.approx(plain(save_reward_model(tmp_path), map(ids_of, TEXTS)))) == (pad != EOS)  # type: ignore[arg-type]


def test_a_bfloat16_model_has_a_float32_head(folder: Path) -> None:
    rewards = values(scorer(folder, dtype="bfloat16"), *TEXTS)
    assert rewards == pytest.approx(values(scorer(folder), *TEXTS), abs=0.1)
    assert any(reward != float(torch.tensor(reward, dtype=torch.bfloat16)) for reward in rewards if reward is not None)


def test_an_encoder_is_read_its_own_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    options: dict[str, Any] = {**sizes, "num_attention_heads": 4, "num_labels": 1, "pad_token_id": PAD}
    model = BertForSequenceClassification(BertConfig(**options))
    spread(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    expected = plain(tmp_path, [ids_of(text) for text in TEXTS])
    assert values(scorer(tmp_path), *TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_model_of_several_classes_is_no_reward_model(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path, labels=2)
    for ask in (lambda: scorer(path), lambda: describe(path)):
        with pytest.raises(ScorerError, match=r"has num_labels=2, and a reward is one number; give a reward model"):
            ask()


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    for ask in (lambda: scorer(tmp_path), lambda: describe(tmp_path)):
        with pytest.raises(ScorerError, match="is a LlamaForCausalLM, not a sequence classifier"):
            ask()


def test_a_head_that_is_in_no_file_is_never_a_random_one(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ScorerError, match=r"1 weights are not in the files, first score\.weight, and would start ran"):
        scorer(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match=r"nowhere: no such folder .*; correct scoring\.path"):
        describe(tmp_path / "nowhere")


def test_a_template_is_taken_from_the_config_where_the_model_has_none(tmp_path: Path, folder: Path) -> None:
    path = save_reward_model(tmp_path / "bare", template=None)
    with pytest.raises(ScorerError, match=r"has no chat template; name the file .* in scoring\.chat_template"):
        scorer(path)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    assert values(scorer(path, chat_template=template), *TEXTS) == values(scorer(folder), *TEXTS)
    template.write_text("{% for m in messages %}")
    with pytest.raises(ScorerError, match=r"not a chat template .*; correct scoring\.chat_template"):
        scorer(path, chat_template=template)


def test_what_cannot_be_read_is_unscored_with_the_reason(folder: Path) -> None:
    found = scorer(folder).score(items("good", "bad " * 70, "good </s> assistant good", "\ud800", "two"))
    assert [score.value is None for score in found] == [False, True, True, True, False]
    assert [score.reason for score in found[1:4]] == [
        "too long: 75 tokens of prompt and completion, limit 64",
        "writes a special token of the scorer's model: '</s>'",
        "not valid Unicode: half a surrogate pair at character 0",
    ]
    short = scorer(folder, max_length=6)
    assert [score.value is None for score in short.score(items("good", "good good"))] == [False, True]
    with pytest.raises(ScorerError, match=r"scoring\.max_length=65 exceeds the 64 positions of"):
        scorer(folder, max_length=65)


def test_what_the_template_refuses_is_unscored(tmp_path: Path) -> None:
    refusing = "{% if messages[-1].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}" + TEMPLATE
    found = scorer(save_reward_model(tmp_path, template=refusing)).score(items("good", "bad"))
    assert found[0].value is not None
    assert (found[1].value, found[1].reason) == (None, "refused by the chat template: no bad words")


def with_a_hole(found: RewardModelScorer) -> RewardModelScorer:
    """Whose model knows one word less. Of these few words the start check reads all, and would refuse the model."""
    with torch.no_grad():
        found._model.get_input_embeddings().get_parameter("weight")[WORDS.index("bad")] = math.nan
    return found


def test_a_model_that_computes_no_number_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"].fill_(math.nan)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ScorerError, match="what it computes is not finite"):
        scorer(tmp_path)


def test_an_output_that_is_no_number_is_unscored_and_the_rest_is_skipped(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    found = with_a_hole(scorer(tmp_path, batch_size=1)).score(items("good", "bad", "two"))
    assert [score.value is None for score in found] == [False, True, False]
    assert found[1].reason == "the model gave nan"
    # The longest goes first.
    half = with_a_hole(scorer(tmp_path, batch_size=1, max_unscored=0.5))
    found = half.score(items("good", "bad bad", "two"), allowed=0)
    assert [score.reason for score in found] == [
        "skipped: more than 50% of items already unscored",
        "the model gave nan",
        "skipped: more than 50% of items already unscored",
    ]


def save_adapter(folder: Path, base: Path, **options: Any) -> nn.Module:
    """A trained adapter with a head on a language model, as PEFT saves it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], **options))
    spread(adapted)
    adapted.config.pad_token_id = PAD
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, nn.Module]:
    tiny().save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    model = save_adapter(folder, tmp_path / "base")
    # The adapter was trained on these base weights, which `spread` has drawn.
    base = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    kept = {
        name.replace(".base_layer", ""): t for name, t in base.items() if "lora" not in name and "score" not in name
    }
    save_file({name: t.contiguous() for name, t in kept.items()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    save_tokenizer(folder, pad_token="<pad>")
    return folder, model


def test_an_adapter_is_merged_into_its_base(adapter: tuple[Path, nn.Module]) -> None:
    folder, model = adapter
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids_of(text)])).logits[0, 0]) for text in TEXTS]
    assert values(scorer(folder), *TEXTS) == pytest.approx(expected, abs=1e-5)
    assert f"in {folder} on {folder.parent / 'base'}" in describe(folder)[1]


def test_an_adapter_that_does_not_fit_is_refused(adapter: tuple[Path, nn.Module]) -> None:
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    save_file({**weights, f"{name}.more": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ScorerError, match=r"1 of its 6 weights do not fit its base, first .*\.more"):
        scorer(folder)
    save_file({key: tensor for key, tensor in weights.items() if "score" not in key}, file, {"format": "pt"})
    with pytest.raises(ScorerError, match="the adapter has no score head, which would start random"):
        scorer(folder)
    save_file(weights, file, {"format": "pt"})
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ScorerError, match="an adapter without a tokenizer, so that nobody knows where"):
        scorer(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(ScorerError, match=r"has task_type=CAUSAL_LM, and scoring\.path takes SEQ_CLS"):
        scorer(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(ScorerError, match=r"its base, base_model_name_or_path in adapter_config\.json, cannot be used"):
        scorer(folder)


@pytest.mark.parametrize("eos", [EOS, [0, EOS]])
def test_an_exported_reward_model_scores_as_it_was_trained(tmp_path: Path, eos: Any) -> None:
    """Training reads at the end token; the newline that the template writes behind it is not in the exported one."""
    chatml = "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{{ ' \n ' }}{% endfor %}"
    base = tmp_path / "base"
    model = tiny()
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(base)
    ended = "<unk>" if isinstance(eos, list) else "</s>"
    save_tokenizer(base, chatml + "{% if add_generation_prompt %}assistant {% endif %}", eos_token=ended)
    trained = load_reward_model(str(base), ModelBlock(dtype="float32"), 0, whole)
    source = tmp_path / "source"
    source.mkdir()
    save_file(dict(checkpoint_weights(trained, whole)), source / "model.safetensors", {"format": "pt"})
    card = RewardModelFacts("tiny", "someone/tiny", "someone/pairs", "`bradley_terry`", {}, {})
    exported = export_reward_model(source, str(base), tmp_path / "out", card)
    newline = WORDS.index("\n")
    prompt = (*(WORDS.index(word) for word in ["user", "say", "</s>"]), newline, WORDS.index("assistant"))
    answers = [(*(WORDS.index(word) for word in text.split()), EOS) for text in TEXTS]
    with torch.no_grad():
        expected = CompletionRewards(trained)(token_batch([Completions(prompt, answers)], "shared", 0)).tolist()
    assert values(scorer(exported), *TEXTS) == pytest.approx(expected, abs=1e-5)


def test_actors_whose_scorers_have_no_model_start_without_torch() -> None:
    code = "import sys, actors.scorer.actor; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert shown.stdout == "False\n"


def describe(path: Path, **options: Any) -> tuple[str, ...]:
    return describe_scorer(RewardModelScoringBlock(path=str(path), **options))


def test_what_people_are_told_of_it(folder: Path, tmp_path: Path) -> None:
    name, model, digest, template = describe(folder)
    assert name == f"reward model {folder}"
    parameters = sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(folder).parameters())
    assert model == f"LlamaForSequenceClassification, {parameters:,} parameters in bfloat16, in {folder}"
    assert digest == f"sha256 {model_hashes(RewardModelScoringBlock(path=str(folder)))[0]} of its files"
    assert template == f"chat template in {folder}"
    path = save_reward_model(tmp_path, pad_token_id=EOS)
    assert describe(path)[-1] == "its pad token is its end token: rewards are read before that, as transformers does"


def test_scores_are_kept_by_what_is_in_the_folder(folder: Path, tmp_path: Path) -> None:
    """The same weights elsewhere are the same scorer; another template is another one."""
    block = RewardModelScoringBlock(path=str(folder), dtype="float32")
    first = load_scorer(block, tmp_path / "scores.sqlite")
    expected = first.score(items("good", "bad"))
    assert first.take_usage()["reward_model"].cache_hits == 0
    moved = save_reward_model(tmp_path / "moved")
    again = load_scorer(block.model_copy(update={"path": str(moved)}), tmp_path / "scores.sqlite")
    assert again.score(items("good", "bad")) == expected
    assert again.take_usage()["reward_model"].cache_hits == 2
    save_tokenizer(moved, f"say {TEMPLATE}", pad_token="<pad>")
    other = load_scorer(block.model_copy(update={"path": str(moved)}), tmp_path / "scores.sqlite")
    assert other.score(items("good"))[0] != expected[0]
    assert other.take_usage()["reward_model"].cache_hits == 0


def test_soft_capped_attention_scores_as_transformers_eager_one(tmp_path: Path) -> None:
    """transformers' own default for this architecture leaves the capping out."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"pad_token_id": PAD, "num_labels": 1, "attn_logit_softcapping": 2.0}
    model = Gemma2ForSequenceClassification(Gemma2Config(**SMALL, head_dim=8, **options))
    spread(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, TEMPLATE, pad_token="<pad>")
    eager = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = [float(eager(input_ids=torch.tensor([ids_of(text)])).logits[0, 0]) for text in TEXTS]
    assert expected != pytest.approx(plain(tmp_path, [ids_of(text) for text in TEXTS]), abs=0.01)
    assert values(scorer(tmp_path), *TEXTS) == pytest.approx(expected, abs=1e-5)


def test_longrope_is_scored_up_to_the_length_at_which_it_changes(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    path = save_reward_model(tmp_path, rope_parameters=rope | {"original_max_position_embeddings": 48})
    (score,) = scorer(path).score(items(" ".join(["say"] * 60)))
    assert score.value is None and "limit 48" in score.reason
    with pytest.raises(ScorerError, match=r"scoring\.max_length=49 exceeds the 48 tokens up to which rotary"):
        scorer(path, max_length=49)
