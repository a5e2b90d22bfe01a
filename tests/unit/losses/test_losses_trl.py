"""Equality with TRL 1.16: its trainers' own loss code runs on the same log-probs, without its models and data.

A trainer is made without its constructor and given the attributes that its loss code reads; the model it calls returns
per-token log-probs that come from random logits.
"""

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylign.config.losses import BradleyTerryRewardLossBlock, KtoLossBlock, MixLossBlock
from raylign.losses import LossState, ld_weights, listwise, reward_model
from tests.unit.losses.sums import CandidateLogps, preference_loss
from tests.unit.losses.test_losses import START, block

pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")
if importlib.metadata.version("trl") != "1.16.0":
    pytest.skip("written for trl 1.16.0", allow_module_level=True)
DPOTrainer: Any = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
KTOTrainer: Any = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
RewardTrainer: Any = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
CPOTrainer: Any = pytest.importorskip("trl.experimental.cpo").CPOTrainer
ORPOTrainer: Any = pytest.importorskip("trl.experimental.orpo").ORPOTrainer

VOCABULARY, PROMPT = 11, 1
LENGTHS = [[5, 8], [6, 4], [3, 3], [1, 7]]


class Model(nn.Module):
    """Stands where a trainer expects a model; answers with what it was given."""

    is_gradient_checkpointing = False

    def __init__(self, answer: Callable[..., SimpleNamespace]) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        return self._answer(*arguments, **options)


def trainer_of(kind: Any, model: nn.Module, **attributes: Any) -> Any:
    """A trainer of this kind with the attributes its loss code reads."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = kind.__new__(kind)
    vars(trainer).update(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return trainer


@dataclass(frozen=True)
class Batch:
    """2G completions, chosen first: ids and a mask of completion tokens [2G, T], logits [2G, T, V] of both models."""

    input_ids: Tensor
    completion_mask: Tensor
    policy_logits: Tensor
    reference_logits: Tensor

    def token_logps(self, logits: Tensor) -> Tensor:
        """[2G, T - 1], zero off the completion."""
        taken = logits[:, :-1].log_softmax(-1).gather(2, self.input_ids[:, 1:, None]).squeeze(2)
        return taken * self.completion_mask[:, 1:]

    def answer(self, logits: Tensor) -> SimpleNamespace:
        """What TRL's fused output head returns."""
        logps = logits[:, :-1].log_softmax(-1)
        log_sum_sq = (2 * logps).logsumexp(-1)
        zeros = torch.zeros_like(log_sum_sq)
        return SimpleNamespace(
            log_probs=self.token_logps(logits),
            log_sum_sq_probs=log_sum_sq,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            logits=logits,
        )

    def groups(self, tail_weight: float = 1.0) -> CandidateLogps:
        """The same as raylign's trainer makes it."""
        lengths = torch.stack(self.completion_mask.sum(1).chunk(2), 1)
        weights = torch.zeros_like(self.completion_mask, dtype=torch.float32)
        for row, pair in enumerate(lengths.tolist()):
            parts = torch.split(ld_weights(pair, tail_weight), pair)
            for index, part in zip((row, row + len(lengths)), parts, strict=True):
                weights[index, self.completion_mask[index].bool()] = part

        def sums(values: Tensor) -> Tensor:
            return torch.stack(values.sum(1).chunk(2), 1)

        policy = self.token_logps(self.policy_logits)
        certainty = (policy - self.answer(self.policy_logits).log_sum_sq_probs) * self.completion_mask[:, 1:]
        return CandidateLogps(
            policy=sums(policy * weights[:, 1:]),
            reference=sums(self.token_logps(self.reference_logits) * weights[:, 1:]),
            lengths=lengths,
            scores=torch.tensor([[1.0, 0.0]]).expand(len(lengths), 2),
            mask=torch.ones(len(lengths), 2, dtype=torch.bool),
            entropies=torch.zeros(len(lengths), 2),
            certainty=(sums(certainty) / lengths).detach(),
            from_reference=torch.zeros(len(lengths), 2, dtype=torch.bool),
            kl_logratios=torch.zeros(len(lengths)),
        )


def batch_of(lengths: Sequence[Sequence[int]], seed: int = 0, peak: float = 1.0) -> Batch:
    """Right-padded rows of one prompt token and a completion; a larger peak makes surer models."""
    generator = torch.Generator().manual_seed(seed)
    flat = [pair[index] for index in (0, 1) for pair in lengths]
    shape = (len(flat), PROMPT + max(flat))
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(flat):
        mask[row, PROMPT : PROMPT + length] = 1
    policy = peak * torch.randn(*shape, VOCABULARY, generator=generator)
    reference = policy + 0.5 * torch.randn(*shape, VOCABULARY, generator=generator)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    return Batch(ids, mask, policy.requires_grad_(), reference)


def compare(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    """Same mean loss and same gradient in the logits."""
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, logits, retain_graph=True)
    found = torch.autograd.grad(ours.mean(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


DPO_OPTIONS = dict(
    ld_alpha=None,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    label_smoothing=0.0,
    use_weighting=False,
    beta=0.1,
)


def trl_dpo(batch: Batch, loss_types: Sequence[str], weights: Sequence[float], options: Mapping[str, Any]) -> Any:
    """The trainer after its `_compute_loss`, and the loss."""
    policy = Model(lambda **_: batch.answer(batch.policy_logits))
    given = DPO_OPTIONS | {name: value for name, value in options.items() if name != "discopop_tau"}
    trainer = trainer_of(
        DPOTrainer,
        policy,
        ref_model=Model(lambda **_: batch.answer(batch.reference_logits)),
        precompute_ref_logps=False,
        loss_types=loss_types,
        loss_weights=weights,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        **given,
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "completion_mask": batch.completion_mask,
    }
    return trainer, trainer._compute_loss(policy, inputs, False)


@pytest.mark.parametrize("lengths", [LENGTHS, *([pair] for pair in LENGTHS)])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"beta": 0.7, "f_divergence_type": "forward_kl"}),
        ("sigmoid", {"f_divergence_type": "js_divergence"}),
        ("sigmoid", {"f_divergence_type": "alpha_divergence"}),
        ("ipo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7}),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("sigmoid", {"ld_alpha": 0.0}),
        ("sigmoid", {"use_weighting": True}),
        ("nca_pair", {"use_weighting": True}),
        ("robust", {"label_smoothing": 0.2}),
        ("hinge", {}),
        ("ipo", {"beta": 0.3}),
        ("sigmoid_norm", {"beta": 2.0}),
        ("sigmoid_norm", {"ld_alpha": 0.5}),
        ("exo_pair", {"label_smoothing": 1e-3}),
        ("nca_pair", {}),
        ("bco_pair", {}),
        ("sppo_hard", {"beta": 0.5}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {"discopop_tau": 0.1}),
    ],
)
def test_pairwise_losses_and_rewards_equal_dpo_trainers(
    loss_type: str, options: Mapping[str, Any], lengths: Sequence[Sequence[int]]
) -> None:
    batch = batch_of(lengths)
    named = block(loss_type, **({"beta": 0.1} | dict(options)))
    logps = batch.groups(named.tail_weight)
    assert (logps.certainty.sum(1) < 0).all(), "TRL 1.16 does not cut weights above 1"
    output = preference_loss(logps, named, START)
    trainer, loss = trl_dpo(batch, [loss_type], [1.0], options)
    compare(output.losses, loss, batch.policy_logits)
    logged = trainer._metrics["train"]
    assert output.chosen_rewards.mean().item() == pytest.approx(logged["rewards/chosen"][0], rel=1e-5, abs=1e-6)
    assert output.rejected_rewards.mean().item() == pytest.approx(logged["rewards/rejected"][0], rel=1e-5, abs=1e-6)


def test_a_mix_equals_dpo_trainers_loss_list() -> None:
    batch = batch_of(LENGTHS)
    members = [{"loss_type": "sigmoid"}, {"loss_type": "bco_pair"}, {"loss_type": "sft"}]
    mix = block("mix", losses=members, loss_weights=[0.8, 0.2, 1.0])
    assert isinstance(mix, MixLossBlock)
    _, loss = trl_dpo(batch, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {})
    compare(preference_loss(batch.groups(), mix, START).losses, loss, batch.policy_logits)


def test_sft_equals_dpo_trainers_token_mean_over_micro_batches() -> None:
    """Told the step's mean length, two micro-batches give what one of TRL's gives."""
    batch = batch_of(LENGTHS)
    _, loss = trl_dpo(batch, ["sft"], [1.0], {})
    state = LossState(mean_chosen_tokens=batch.groups().lengths[:, 0].double().mean().item())
    groups = batch.groups()
    halves = [
        CandidateLogps(**{name: getattr(groups, name)[rows] for name in CandidateLogps.__slots__})
        for rows in (slice(0, 1), slice(1, 4))
    ]
    compare(
        torch.cat([preference_loss(half, block("sft"), state).losses for half in halves]), loss, batch.policy_logits
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_kto_equals_kto_trainers_with_its_mismatched_completions(weights: tuple[float, float]) -> None:
    batch, mismatched = batch_of(LENGTHS), batch_of(LENGTHS, seed=1)
    groups = batch.groups()
    kl_logps, kl_reference = (
        mismatched.token_logps(logits).sum(1) for logits in (mismatched.policy_logits, mismatched.reference_logits)
    )
    kl = max(0.0, (kl_logps - kl_reference).mean().item())
    assert kl > 0.01, "a KL of 0 would test nothing"

    def answer(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        if input_ids is mismatched.input_ids:
            return mismatched.answer(mismatched.policy_logits)
        return batch.answer(batch.policy_logits)

    model = Model(answer)
    trainer = trainer_of(
        KTOTrainer,
        model,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "completion_mask": batch.completion_mask,
        "KL_input_ids": mismatched.input_ids,
        "KL_attention_mask": torch.ones_like(mismatched.input_ids),
        "KL_completion_mask": mismatched.completion_mask,
        "label": torch.tensor([True] * 4 + [False] * 4),
        "ref_logps": batch.token_logps(batch.reference_logits).sum(1),
        "ref_KL_logps": kl_reference.detach(),
    }
    loss = trainer._compute_loss(model, inputs, False)

    named = KtoLossBlock(beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1])
    compare(preference_loss(groups, named, LossState(kl=kl)).losses, loss, batch.policy_logits)
    plain = listwise.kto(
        batch.token_logps(batch.policy_logits).sum(1),
        inputs["ref_logps"],
        inputs["label"],
        kl,
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    compare(plain, loss, batch.policy_logits)


def trl_reference_free(kind: Any, batch: Batch, **attributes: Any) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics; the rows go in as TRL's collator lays them out."""
    model = Model(lambda *_, **__: SimpleNamespace(logits=batch.policy_logits))
    trainer = trainer_of(kind, model, **attributes)
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)
    # Attention ends with the completion, as ORPO's NLL takes every attended token.
    attention = batch.completion_mask.clone()
    attention[:, :PROMPT] = 1
    inputs = {}
    for name, tensor in (("input_ids", batch.input_ids), ("attention_mask", attention), ("labels", labels)):
        inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = tensor.chunk(2)
    loss, metrics = trainer.get_batch_loss_metrics(model, inputs)
    return loss, metrics


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]])
@pytest.mark.parametrize(
    ("loss_type", "options", "trl_loss_type"),
    [
        ("cpo", {"cpo_alpha": 1.0, "beta": 0.1, "label_smoothing": 0.1}, "sigmoid"),
        ("cpo", {"cpo_alpha": 0.0, "beta": 0.3}, "sigmoid"),
        ("simpo", {"simpo_gamma": 0.5, "beta": 2.0, "label_smoothing": 0.1}, "simpo"),
        ("alphapo", {"alpha": 0.25, "simpo_gamma": 0.5, "beta": 2.0}, "simpo"),
        ("alphapo", {"alpha": -0.5, "simpo_gamma": 0.1, "beta": 2.0}, "simpo"),
    ],
)
def test_reference_free_losses_equal_cpo_trainers(
    loss_type: str, options: Mapping[str, Any], trl_loss_type: str, lengths: Sequence[Sequence[int]]
) -> None:
    batch = batch_of(lengths)
    given = {"cpo_alpha": 0.0, "alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.0} | dict(options)
    loss, logged = trl_reference_free(CPOTrainer, batch, loss_type=trl_loss_type, **given)
    output = preference_loss(batch.groups(), block(loss_type, **options), START)
    compare(output.losses, loss, batch.policy_logits)
    assert output.chosen_rewards.mean().item() == pytest.approx(logged["rewards/chosen"], rel=1e-5)
    assert output.rejected_rewards.mean().item() == pytest.approx(logged["rewards/rejected"], rel=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]])
def test_orpo_equals_orpo_trainers(lengths: Sequence[Sequence[int]]) -> None:
    """TRL's NLL also covers the prompt; a prompt of one token has none to predict."""
    batch = batch_of(lengths)
    loss, logged = trl_reference_free(ORPOTrainer, batch, beta=0.1)
    output = preference_loss(batch.groups(), block("orpo"), START)
    compare(output.losses, loss, batch.policy_logits)
    assert output.chosen_rewards.mean().item() == pytest.approx(logged["rewards/chosen"], rel=1e-5)
    for name, values in output.metrics.items():
        assert values.mean().item() == pytest.approx(logged[name], rel=1e-5), name


@pytest.mark.parametrize("center_rewards_coefficient", [None, 0.01])
@pytest.mark.parametrize("margin", [None, torch.tensor([0.3, 0.0, 1.0])])
def test_reward_models_equal_reward_trainers(center_rewards_coefficient: float | None, margin: Tensor | None) -> None:
    rewards = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model = Model(lambda **_: SimpleNamespace(logits=rewards))
    args = SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient)
    inputs: dict[str, Any] = {"attention_mask": torch.ones(6, 2)} | ({} if margin is None else {"margin": margin})
    loss = trainer_of(RewardTrainer, model, args=args).compute_loss(model, inputs)
    chosen, rejected = rewards.squeeze(1).chunk(2)
    block = BradleyTerryRewardLossBlock(
        center_rewards_coefficient=center_rewards_coefficient, margin="none" if margin is None else "scores"
    )
    # The scores' gap is the margin.
    scores = torch.zeros(3, 2) if margin is None else torch.stack([margin, torch.zeros(3)], 1)
    found = reward_model.reward_loss(
        torch.stack([chosen, rejected], 1), scores, torch.ones(3, 2, dtype=torch.bool), block
    )
    compare(found.losses, loss, rewards)
