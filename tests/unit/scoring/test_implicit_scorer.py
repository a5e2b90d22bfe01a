"""Implicit rewards of language models of a few thousand weights, against log-probs worked out from plain logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.config.losses import SigmoidLossBlock
from raylign.config.scoring import ImplicitScoringBlock
from raylign.errors import ScorerError
from raylign.losses import LossInput, LossState, preference_loss
from raylign.records import Candidate, Preference, Prompt
from raylign.scoring.base import ScoringItem
from raylign.scoring.implicit import ImplicitScorer, by_prompt, model_hashes
from raylign.scoring.load import describe_scorer
from raylign.training.logprobs import CompletionLogps
from raylign.training.preferences import loss_input, preference_batch
from tests.unit.scoring.test_reward_model_scorer import WORDS, save_reward_model, save_tokenizer, spread
from tests.unit.tiny_models import IDS, SMALL, plain

EOS = WORDS.index("</s>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TEXTS = ["good", "bad film", "one two one two good film", "two good"]
BETA = 0.1


def model_of(seed: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **IDS, max_position_embeddings=64, **options))
    spread(model)
    model.eval()
    return model


def save_model(folder: Path, seed: int) -> Path:
    model_of(seed).save_pretrained(folder)
    save_tokenizer(folder, TEMPLATE, pad_token="<pad>")
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("policy"), 1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), 2)


def block_of(policy: Path, reference: Path, **options: Any) -> ImplicitScoringBlock:
    block = {"policy_path": str(policy), "reference_path": str(reference), "dtype": "float32", "max_unscored": 1.0}
    return ImplicitScoringBlock.model_validate(block | options)


def scorer(policy: Path, reference: Path, **options: Any) -> ImplicitScorer:
    return ImplicitScorer(block_of(policy, reference, **options), torch.device("cpu"))


def item(text: str, ask: str = "say") -> ScoringItem:
    return ScoringItem(Prompt(ask, ({"role": "user", "content": ask},), (99,)), text)


def values(found: ImplicitScorer, texts: Sequence[str] = TEXTS) -> list[float | None]:
    return [score.value for score in found.score([item(text) for text in texts])]


def prompt_ids(ask: str = "say") -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in ("user", ask, "</s>", "assistant"))


def answer_ids(text: str) -> tuple[int, ...]:
    return (*(WORDS.index(word) for word in text.split()), EOS)


def ratio(text: str, ask: str = "say", seeds: tuple[int, int] = (1, 2)) -> float:
    ours, theirs = (sum(plain(model_of(seed), prompt_ids(ask), answer_ids(text))) for seed in seeds)
    return ours - theirs


def test_log_ratios_are_those_of_plain_logits(policy: Path, reference: Path) -> None:
    expected = [BETA * ratio(text) for text in TEXTS]
    found = scorer(policy, reference).score([item(text) for text in TEXTS])
    assert [score.value for score in found] == pytest.approx(expected, abs=1e-5)
    logps = sum(plain(model_of(1), prompt_ids(), answer_ids("bad film")))
    assert found[1].parts["policy_logps"] == pytest.approx(logps, abs=1e-4)
    assert found[1].parts["tokens"] == 3
    assert values(scorer(policy, reference, beta=0.5)) == pytest.approx([5 * value for value in expected], abs=5e-5)


def test_a_mean_over_tokens_where_that_is_wanted(policy: Path, reference: Path) -> None:
    expected = [BETA * ratio(text) / (len(text.split()) + 1) for text in TEXTS]
    assert values(scorer(policy, reference, length_normalised=True)) == pytest.approx(expected, abs=1e-5)


def test_batches_and_prompts_that_are_shared_change_nothing(policy: Path, reference: Path) -> None:
    items = [item(text, ask) for text in TEXTS for ask in ("say", "film")]
    expected = [BETA * ratio(text, ask) for text in TEXTS for ask in ("say", "film")]
    for options in ({}, {"batch_size": 1}, {"max_tokens_per_batch": 16}):
        found = [score.value for score in scorer(policy, reference, **options).score(items)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_one_prompt_counts_once_in_a_batch(policy: Path) -> None:
    a, b = (1,) * 4, (2,) * 4
    rows = {0: (a, (5,) * 2), 1: (b, (5,) * 3), 2: (a, (5,) * 3), 3: (a, (5,) * 4), 5: (b, (5,) * 9)}
    # 4 + 2 + 3 = 9 tokens, then 4 + 4 and the other prompt's, which do not fit together.
    block = block_of(policy, policy, max_tokens_per_batch=9)
    assert by_prompt(rows, block) == [[0, 2], [3], [1], [5]]
    assert by_prompt(rows, block_of(policy, policy, batch_size=3)) == [[0, 2, 3], [1, 5]]


def test_equal_checkpoints_give_zero(policy: Path) -> None:
    assert values(scorer(policy, policy)) == [0.0] * len(TEXTS)


def test_it_is_the_implicit_reward_of_training(policy: Path, reference: Path) -> None:
    texts = ["bad film", "one two one two good film"]
    candidates = tuple(Candidate("p", i, answer_ids(text), (), "", "stop", 0, 0) for i, text in enumerate(texts))

    def trained(model: nn.Module, reference_logps: tuple[float, ...]) -> LossInput:
        pair = Preference(Prompt("p", (), prompt_ids()), candidates, (1.0, 0.0), (1.0, 1.0), reference_logps)
        batch = preference_batch([pair], [1.0], "shared", 0)
        return loss_input(batch, CompletionLogps(model)(batch.tokens))

    with torch.no_grad():
        of_reference = tuple(trained(model_of(2), (0.0, 0.0)).policy[0].tolist())
        loss = preference_loss(trained(model_of(1), of_reference), SigmoidLossBlock(beta=BETA), LossState())
    expected = [float(loss.chosen_rewards[0]), float(loss.rejected_rewards[0])]
    assert values(scorer(policy, reference), texts) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def adapter(tmp_path: Path, reference: Path) -> tuple[Path, nn.Module]:
    """A policy that is an adapter on the reference, without a tokenizer of its own."""
    adapted = get_peft_model(model_of(2), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(reference)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter", adapted.eval()


def test_an_adapter_against_its_base_and_against_another_model(
    adapter: tuple[Path, nn.Module], policy: Path, reference: Path
) -> None:
    folder, model = adapter
    ours = [sum(plain(model, prompt_ids(), answer_ids(text))) for text in TEXTS]
    for other, seed in ((reference, 2), (policy, 1)):
        theirs = [sum(plain(model_of(seed), prompt_ids(), answer_ids(text))) for text in TEXTS]
        expected = [BETA * (one - two) for one, two in zip(ours, theirs, strict=True)]
        assert values(scorer(folder, other)) == pytest.approx(expected, abs=1e-5)
    assert values(scorer(folder, folder)) == [0.0] * len(TEXTS)


def test_what_cannot_be_read_is_unscored_with_the_reason(policy: Path, reference: Path) -> None:
    found = scorer(policy, reference).score([item(text) for text in ("good", "bad " * 70, "</s>", "\ud800", "two")])
    assert [score.value is None for score in found] == [False, True, True, True, False]
    assert [score.reason for score in found[1:4]] == [
        "too long: 75 tokens of prompt and completion, limit 64",
        "writes a special token of the scorer's model: '</s>'",
        "not valid Unicode: half a surrogate pair at character 0",
    ]


def test_models_that_do_not_fit_are_refused(tmp_path: Path, policy: Path) -> None:
    other = save_model(tmp_path / "other", 3)
    WORDS.append("more")
    try:
        save_tokenizer(tmp_path / "wider", TEMPLATE, pad_token="<pad>")
    finally:
        WORDS.pop()
    model_of(4).save_pretrained(tmp_path / "wider")
    with pytest.raises(ScorerError, match=r"scoring\.reference_path: .*other has another vocabulary .*'more'"):
        scorer(tmp_path / "wider", other)
    reward = save_reward_model(tmp_path / "reward")
    with pytest.raises(ScorerError, match=r"is a LlamaForSequenceClassification.*; take scoring\.type=reward_model"):
        scorer(policy, reward)
    with pytest.raises(ScorerError, match=r"nowhere: no such folder .*; correct scoring\.reference_path"):
        describe_scorer(block_of(policy, tmp_path / "nowhere"))
    with pytest.raises(ScorerError, match=r"scoring\.policy_revision=main has no meaning"):
        describe_scorer(block_of(policy, policy, policy_revision="main"))


def test_what_people_are_told_of_it(policy: Path, reference: Path) -> None:
    block = block_of(policy, reference)
    name, how, *lines = describe_scorer(block)
    assert name == f"implicit reward of {policy} against {reference}"
    assert how == "beta 0.1, summed over tokens"
    parameters = sum(parameter.numel() for parameter in model_of(1).parameters())
    first, second = model_hashes(block)
    assert lines == [
        f"policy: {parameters:,} parameters in float32, in {policy}",
        f"sha256 {first} of its files",
        f"reference: {parameters:,} parameters in float32, in {reference}",
        f"sha256 {second} of its files",
        f"chat template in {policy}",
    ]
