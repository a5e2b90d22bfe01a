"""A step's micro-batches on a device that has no values: whatever asked for one before the step's end would fail."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from raylign.config.losses import (
    BradleyTerryRewardLossBlock,
    KlLossBlock,
    LossBlock,
    MixLossBlock,
    PlackettLuceRewardLossBlock,
    RewardLossBlock,
    SftLossBlock,
    SigmoidLossBlock,
)
from raylign.errors import TrainerError
from raylign.losses import LossState
from raylign.losses.preference import LOSSES
from raylign.records import Candidate, KlSample, Preference, Prompt
from raylign.training.kernels import head
from raylign.training.learners import Learner, PolicyLearner, RewardLearner, Totals
from raylign.training.pieces import score
from raylign.training.preferences import preference_batch, to_device, with_means
from raylign.training.sequences import Layout
from tests.unit.tiny_models import PACKABLE, build

META = torch.device("meta")
KL = MixLossBlock(losses=(SigmoidLossBlock(), KlLossBlock()))
BLOCKS: list[LossBlock] = [*(block() for block in LOSSES if "function" not in block.model_fields), KL]
REWARD_BLOCKS: list[RewardLossBlock] = [
    BradleyTerryRewardLossBlock(margin="scores", center_rewards_coefficient=0.01),
    PlackettLuceRewardLossBlock(),
]


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies from the device to the host, which are all ones; PyTorch refuses every other question."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        device = options.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and device is not None and device.type == "cpu":
            self.count += 1
            return torch.ones(args[0].shape, dtype=options.get("dtype") or args[0].dtype)
        return func(*args, **options)


def preferences(sizes: Sequence[int]) -> list[Preference]:
    """Of completions of 1, 2, ... tokens behind prompts of 3, each with a KL sample."""
    found = []
    for size in sizes:
        candidates = [Candidate("p", i, (4 + i,) * (i + 1), (-1.0,) * (i + 1), "", "stop", 0, 0) for i in range(size)]
        by_token = tuple(candidate.logprobs for candidate in candidates)
        preference = Preference(
            Prompt("p", (), (3, 4, 5)),
            tuple(candidates),
            tuple(float(-i) for i in range(size)),
            (1.0,) * size,
            tuple(-2.0 - i for i in range(size)),
            kl_sample=KlSample((3, 4, 5), (6, 7), reference_logp=-4.0),
        )
        found.append(replace(preference, reference_logprobs=by_token, old_logprobs=by_token))
    return found


def step_on_meta(
    learner: Learner, of_batches: Sequence[list[Preference]], layout: Layout, with_kl: bool, tail_weight: float = 0.5
) -> int:
    """How often a step of forward and backward passes over `of_batches`, a filler among them, reads the device."""
    module = learner.module()
    everything = [preference for batch in of_batches for preference in batch]
    state = with_means(LossState(), everything, everything, longest=8)
    with Reads() as reads:
        totals: list[Totals] = []
        for number, mine in enumerate(of_batches):
            weights = [float(number > 0)] * len(mine)
            form = (layout, 0, 1.0 if with_kl else tail_weight, 0, with_kl)
            batch = to_device(preference_batch(mine, weights, *form), META)
            loss, own = learner.measure(score(module, batch), batch, state)
            torch.autograd.backward((loss.losses * batch.weights).sum())
            totals.append(own)
        assert reads.count == 0
        learner.metrics(Totals.of_all(totals).on_host(), tuple(loss.metrics))
    return int(reads.count)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    nn.Module.to(model, META)
    return model


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._TILES, "meta", head.Tile(4, 16))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block.loss_type))
def test_a_step_of_a_policy_waits_for_its_metrics_once(block: LossBlock) -> None:
    sizes = [[2], [2, 2]] if block.pairs_only else [[2], [3, 1]]
    learner = PolicyLearner(on_meta(build(PACKABLE["qwen3"])), block)
    batches = [preferences(of_batch) for of_batch in sizes]
    assert step_on_meta(learner, batches, "shared", block.needs_kl_gradient) == 1


@pytest.mark.parametrize("name", ["gemma3", "mistral", "llama"])
def test_no_window_or_adapter_reads_the_device(name: str) -> None:
    model = on_meta(build(PACKABLE[name]))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    learner = PolicyLearner(adapted, SftLossBlock())
    assert step_on_meta(learner, [preferences([2]), preferences([3, 1])], "packed", with_kl=False) == 1


@pytest.mark.parametrize("block", REWARD_BLOCKS, ids=lambda block: str(block.loss_type))
def test_a_step_of_a_reward_model_waits_for_its_metrics_once(block: RewardLossBlock) -> None:
    config = PACKABLE["llama"].__class__(**PACKABLE["llama"].to_dict() | {"num_labels": 1})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).to(META)
    sizes = [[2], [2, 2]] if block.pairs_only else [[2], [3, 2]]
    learner = RewardLearner(model, block)
    of_batches = [preferences(of_batch) for of_batch in sizes]
    assert step_on_meta(learner, of_batches, "shared", with_kl=False, tail_weight=1.0) == 1


def test_totals_of_micro_batches_add_up_and_the_highest_counts() -> None:
    parts = [
        Totals(torch.tensor([1.0, 2.0]), torch.tensor([-3.0])),
        Totals(torch.tensor([4.0, 8.0]), torch.tensor([5.0])),
    ]
    found = Totals.of_all(parts).on_host()
    assert found.sums.tolist() == [5.0, 10.0] and found.highest.tolist() == [5.0]
    none: Tensor = torch.empty(0, dtype=torch.float64)
    assert Totals.of_all([Totals(part.sums, none) for part in parts]).on_host().highest.numel() == 0


def test_a_learner_measures_by_the_loss_it_took_last() -> None:
    """Of the same scores the rewards are beta times the log-ratios, and the loss is ln(1 + e^-margin)."""
    model = build(PACKABLE["llama"])
    learner = PolicyLearner(model, SigmoidLossBlock(beta=0.1))
    batch = preference_batch(preferences([2, 2]), [1.0, 1.0], "shared", 0)
    with torch.no_grad():
        scores = score(learner.module(), batch)
        before, _ = learner.measure(scores, batch, LossState())
        learner.take_loss(SigmoidLossBlock(beta=0.4))
        after, _ = learner.measure(scores, batch, LossState())
    assert torch.allclose(after.chosen_rewards, 4 * before.chosen_rewards)
    margins = after.chosen_rewards - after.rejected_rewards
    assert torch.allclose(after.losses, torch.log1p(torch.exp(-margins)), atol=1e-5)
    with pytest.raises(TrainerError, match="loss_type=bradley_terry, and the model in training learns by another kind"):
        learner.take_loss(BradleyTerryRewardLossBlock())
