"""Reward models, demonstrations and held-out preferences on real DeepSpeed ranks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from actors.trainer.group import TrainerGroup
from raylign.config.losses import BradleyTerryRewardLossBlock, SftLossBlock, SigmoidLossBlock
from raylign.config.reference import NoReferenceBlock
from raylign.errors import TrainerError
from raylign.evaluation.calibration import calibration
from raylign.evaluation.held_out import HeldOut
from raylign.export.card import RewardModelFacts
from raylign.export.reward_model import export_reward_model
from raylign.records import Candidate, Preference
from raylign.run.checkpoints import Metrics
from tests.integration.ranks import Processes, preferences, spec_of, train_round

pytestmark = pytest.mark.slow

EOS = 2
PAIRS = 16
LORA = {"lora": {"r": 4, "lora_alpha": 8}}
ONE: dict[str, Any] = {"per_device_train_batch_size": 8, "adam_epsilon": 1e-6, "num_train_epochs": 3}
TWO: dict[str, Any] = ONE | {"ranks": 2, "per_device_train_batch_size": 4}
REWARD: dict[str, Any] = {
    "loss": BradleyTerryRewardLossBlock(center_rewards_coefficient=0.01),
    "reference": NoReferenceBlock(),
}
SFT: dict[str, Any] = {"loss": SftLossBlock(), "reference": NoReferenceBlock()}
CARD = RewardModelFacts("tiny-rm", "someone/tiny", "someone/pairs", "`bradley_terry`", {"accuracy": 1.0}, {})
Steps = list[Metrics]


def ended(number: int) -> list[Preference]:
    """Pairs whose completions end with EOS, which is the pad token of the tiny model as well."""

    def with_eos(candidate: Candidate) -> Candidate:
        return replace(candidate, token_ids=(*candidate.token_ids, EOS), logprobs=(*candidate.logprobs, -1.0))

    return [replace(p, candidates=tuple(map(with_eos, p.candidates))) for p in preferences(number)]


def demonstrations(number: int) -> list[Preference]:
    return [
        replace(p, candidates=p.candidates[:1], scores=p.scores[:1], weights=p.weights[:1]) for p in preferences(number)
    ]


def close(found: Sequence[Metrics], expected: Sequence[Metrics], names: Sequence[str]) -> None:
    assert len(found) == len(expected) > 0
    for step, (left, right) in enumerate(zip(found, expected, strict=True)):
        for name in names:
            assert left[name] == pytest.approx(right[name], rel=2e-4, abs=2e-5), (step, name)


def same(found: HeldOut, expected: HeldOut) -> None:
    for name in ("losses", "chosen", "rejected"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-5), name
    assert dict(found.metrics) == pytest.approx(dict(expected.metrics), rel=1e-4, abs=1e-5)


def exported(group: TrainerGroup, model: dict[str, Any], base: str, folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    if model:
        group.save_adapter(str(source))
    else:
        group.save_weights(str(source / "model.safetensors"))
    return export_reward_model(source, base, folder / "out", CARD)


def rewards_of(folder: Path, pairs: Sequence[Preference]) -> list[list[float]]:
    """transformers' own, in one batch that the folder's own tokenizer pads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [[*p.prompt.token_ids, *c.token_ids] for p in pairs for c in p.candidates]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.view(-1, 2).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "options"), [({}, {"zero_stage": 2}), (LORA, {"zero_stage": 3})], ids=["full", "lora"]
)
def test_a_reward_model_learns_and_is_exported_as_it_was_trained(
    tiny_llama: str, ranks: Processes, tmp_path: Path, model: dict[str, Any], options: dict[str, Any]
) -> None:
    pairs = ended(PAIRS)
    group = ranks.group(spec_of(tiny_llama, model, ONE, **REWARD))
    layout: Any = ray.get(group.handles[0].layout.remote())
    assert layout == "shared"
    before = group.evaluate(pairs)
    steps = train_round(group, pairs)
    after, few = group.evaluate(pairs), group.evaluate(pairs[:1])
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert after.metrics["accuracy"] == 1.0 > before.metrics["accuracy"]
    _check_metrics(after)
    assert calibration(after.chosen, after.rejected).nll < calibration(before.chosen, before.rejected).nll

    folder = exported(group, model, tiny_llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] != EOS
    assert (folder / "chat_template.jinja").is_file() and "tiny-rm" in (folder / "README.md").read_text()
    found = rewards_of(folder, pairs)
    assert [chosen for chosen, _ in found] == pytest.approx(after.chosen, abs=1e-4)
    assert [rejected for _, rejected in found] == pytest.approx(after.rejected, abs=1e-4)

    spread = ranks.group(spec_of(tiny_llama, model, TWO | options, **REWARD))
    same(spread.evaluate(pairs), before)
    close(train_round(spread, pairs), steps, ("loss", "grad_norm", "accuracy", "margin", "min_reward", "max_reward"))
    same(spread.evaluate(pairs), after)
    same(spread.evaluate(pairs[:1]), few)  # one of the ranks has a filler alone


def _check_metrics(found: HeldOut) -> None:
    """Against the rewards of the preferences."""
    both = [*found.chosen, *found.rejected]
    margins = [best - worst for best, worst in zip(found.chosen, found.rejected, strict=True)]
    expected = {
        "loss": sum(found.losses) / PAIRS,
        "rewards/chosen": sum(found.chosen) / PAIRS,
        "rewards/rejected": sum(found.rejected) / PAIRS,
        "rewards/margins": sum(margins) / PAIRS,
        "margin": sum(margins) / PAIRS,
        "rewards/accuracies": sum(margin > 0 for margin in margins) / PAIRS,
        "accuracy": sum(margin > 0 for margin in margins) / PAIRS,
        "mean_reward": sum(both) / (2 * PAIRS),
        "min_reward": min(both),
        "max_reward": max(both),
        "num_tokens": sum(len(p.prompt.token_ids) + len(c.token_ids) for p in ended(PAIRS) for c in p.candidates),
    }
    assert dict(found.metrics) == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_goes_on_from_its_state(tiny_llama: str, ranks: Processes, tmp_path: Path) -> None:
    """To the bit, though the first group evaluates between its steps and the second does not."""
    pairs = ended(PAIRS)
    spec = spec_of(tiny_llama, LORA, ONE, **REWARD)
    group = ranks.group(spec)
    count = group.begin_round(pairs, 3, 0, [])
    first = [group.train_step() for _ in range(2)]
    group.save_state(str(tmp_path / "state"), 1)
    rest = []
    for _ in range(2, count):
        rest.append(group.train_step())
        group.evaluate(pairs[:3])
    held_out = group.evaluate(pairs)
    again = ranks.group(spec)
    again.load_state(str(tmp_path / "state"))
    again.begin_round(pairs, 3, 0, first)
    assert [again.train_step() for _ in range(2, count)] == rest
    assert again.evaluate(pairs) == held_out


def test_a_trained_reward_model_can_be_trained_on(tiny_llama: str, ranks: Processes, tmp_path: Path) -> None:
    pairs = ended(PAIRS)
    group = ranks.group(spec_of(tiny_llama, {}, ONE, **REWARD))
    train_round(group, pairs)
    expected = group.evaluate(pairs)
    folder = exported(group, {}, tiny_llama, tmp_path)
    again = ranks.group(spec_of(str(folder), LORA, TWO | {"zero_stage": 3}, **REWARD))
    same(again.evaluate(pairs), expected)


def _trl_sft(folder: str, data: Sequence[Preference], out: Path, accumulation: int) -> Steps:
    """TRL's own trainer on the same 8 demonstrations a step, in `accumulation` micro-batches."""
    rows = [
        {
            "input_ids": [*p.prompt.token_ids, *p.candidates[0].token_ids],
            "completion_mask": [0] * len(p.prompt.token_ids) + [1] * len(p.candidates[0].token_ids),
        }
        for p in data
    ]
    args = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


TOKENS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 30}


@pytest.mark.parametrize(
    ("options", "accumulation", "names"),
    [
        (TOKENS, 2, ("loss", "grad_norm")),  # TRL averages its metrics over micro-batches, whatever their tokens
        (TWO | {"zero_stage": 3}, 1, ("loss", "grad_norm", "entropy", "mean_token_accuracy")),
    ],
    ids=["accumulated", "2 ranks, ZeRO 3"],
)
def test_demonstrations_are_learnt_as_by_trl(
    tiny_llama: str,
    ranks: Processes,
    tmp_path: Path,
    options: dict[str, Any],
    accumulation: int,
    names: tuple[str, ...],
) -> None:
    """Of 8 demonstrations, so that every step has all of them, whatever the order."""
    data = demonstrations(8)
    expected = _trl_sft(tiny_llama, data, tmp_path, accumulation)
    group = ranks.group(spec_of(tiny_llama, {}, ONE | options, **SFT))
    held_out = group.evaluate(data)
    steps = list(group.train(data, seed=3))
    close(steps, expected, names)
    assert held_out.metrics["loss"] == pytest.approx(steps[0]["loss"], rel=1e-5)
    assert sum(held_out.losses) / 8 == pytest.approx(steps[0]["loss"], rel=1e-5)
    logged = {"loss", "logps/chosen", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"}
    assert set(held_out.metrics) == logged and set(steps[0]) == logged | {"grad_norm", "learning_rate"}


def test_a_policy_is_evaluated_the_same_by_any_ranks(tiny_llama: str, ranks: Processes) -> None:
    pairs = preferences(7)
    found = []
    for options in (ONE, TWO | {"zero_stage": 3}):
        group = ranks.group(spec_of(tiny_llama, LORA, options, loss=SigmoidLossBlock(beta=0.1)))
        known = group.with_reference(pairs, seed=3, rounds_done=0)
        steps = list(group.train(known, seed=3))
        found.append(group.evaluate(known))
        assert found[-1].metrics["loss"] < steps[0]["loss"]
        with pytest.raises(TrainerError, match="has 0 reference log-probs for 2 candidates, and loss_type=sigmoid"):
            group.evaluate(pairs)
    same(found[1], found[0])
    held_out = found[0]
    margins = [best - worst for best, worst in zip(held_out.chosen, held_out.rejected, strict=True)]
    losses = [torch.nn.functional.softplus(torch.tensor(-margin)).item() for margin in margins]
    assert held_out.losses == pytest.approx(losses, rel=1e-5)
    assert held_out.metrics["rewards/margins"] == pytest.approx(sum(margins) / 7)
    assert held_out.metrics["loss"] == pytest.approx(sum(losses) / 7)
