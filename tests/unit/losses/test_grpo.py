"""GRPO and its kin against TRL's own code on random log-probs, against numbers worked out by hand, and in gradients."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import nanstd

from raylign.config import OfflineDpoConfig, parse_config
from raylign.config.load import overridden, parse_tree
from raylign.config.losses import GrpoLossBlock
from raylign.errors import ConfigError
from raylign.losses import LossInput, LossOutput, LossState, TokenLogps, preference_loss
from raylign.losses.grpo import advantages
from tests.unit.losses.test_losses_trl import trainer_of

with pytest.MonkeyPatch.context() as _without:
    # TRL would load all of vLLM, which the losses do without.
    _without.setitem(sys.modules, "vllm", None)
    from trl.trainer.grpo_trainer import GRPOTrainer

LONGEST = 12
LENGTHS = ((3, 7, 1, 5), (2, 2, 9, 4), (6, 1, 1, 8))
SCORES = ((0.9, 0.5, 0.5, -0.3), (2.0, 1.0, 0.5, 0.25), (0.1, 0.0, -4.0, -4.0))


def groups(
    lengths: Sequence[Sequence[int]] = LENGTHS,
    scores: Sequence[Sequence[float]] = SCORES,
    *,
    apart: float = 0.4,
    dtype: torch.dtype = torch.float64,
) -> LossInput:
    """Groups of one size; policy, old, sampler and reference are `apart` from each other, in nats a token."""
    generator = torch.Generator().manual_seed(len(lengths))
    flat = [length for group in lengths for length in group]
    count, shape = sum(flat), (len(lengths), len(lengths[0]))

    def near(other: Tensor, by: float) -> Tensor:
        return other + by * torch.randn(count, generator=generator, dtype=dtype)

    old = -3 * torch.rand(count, generator=generator, dtype=dtype)
    zeros = torch.zeros(count, dtype=dtype)
    return LossInput(
        TokenLogps(
            policy=near(old, apart).requires_grad_(),
            owners=torch.arange(len(flat)).repeat_interleave(torch.tensor(flat)),
            entropies=zeros,
            certainty=zeros,
            sampler=near(old, 0.5 * apart),
            old=old,
            reference=near(old, apart),
        ),
        reference=torch.zeros(shape, dtype=dtype),
        lengths=torch.tensor(lengths),
        scores=torch.tensor(scores, dtype=dtype),
        mask=torch.ones(shape, dtype=torch.bool),
        from_reference=torch.zeros(shape, dtype=torch.bool),
        kl_logratios=torch.zeros(shape[0], dtype=dtype),
    )


def part(whole: LossInput, rows: slice, size: int = 4) -> LossInput:
    """The first `size` candidates of some of the groups, which have four."""
    owners = whole.tokens.owners - rows.start * 4
    kept = (owners >= 0) & (owners < (rows.stop - rows.start) * 4) & (owners % 4 < size)
    names = ("reference", "lengths", "scores", "mask", "from_reference")
    some = {name: getattr(whole, name)[rows, :size] for name in names}
    tokens = whole.tokens.select(kept, owners // 4 * size + owners % 4)
    return LossInput(tokens, **some, kl_logratios=whole.kl_logratios[rows])


def block(**options: Any) -> GrpoLossBlock:
    return GrpoLossBlock.model_validate(options)


def output_of(logps: LossInput, **options: Any) -> LossOutput:
    return preference_loss(logps, block(**options), LossState(max_completion_tokens=LONGEST))


def sampler_ratio(old: Tensor, sampler: Tensor, mask: Tensor, options: GrpoLossBlock) -> Tensor:
    """TRL makes it amid its sampling, where nothing else can call it: worked out anew."""
    gaps = (old - sampler) * mask
    mode = options.vllm_importance_sampling_mode
    ratio = (gaps.sum(-1, keepdim=True) if mode.startswith("sequence") else gaps).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    outside = (ratio < (low or -math.inf)) | (ratio > (high or math.inf))
    return ratio.masked_fill(outside, 0.0)


def trl(logps: LossInput, options: GrpoLossBlock) -> tuple[Tensor, Mapping[str, list[float]]]:
    """The loss and the metrics of TRL's trainer on the same tokens, one micro-batch a step.

    Its std has a factor n / (n - 1) that is rounded to fp32.
    """
    lengths = logps.lengths.flatten().tolist()

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(torch.split(values, lengths)), batch_first=True)

    tokens = logps.tokens
    assert tokens.old is not None and tokens.sampler is not None and tokens.reference is not None
    mask = padded(torch.ones_like(tokens.policy)).detach()
    ids = torch.ones(mask.shape, dtype=torch.int64)
    model = nn.Linear(1, 1)
    trainer = trainer_of(
        GRPOTrainer,
        model,
        args=SimpleNamespace(
            use_bias_correction_kl=options.use_bias_correction_kl, delta=options.delta, steps_per_generation=1
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.importance_sampling_level,
        beta=options.beta,
        loss_type=options.loss_type,
        epsilon_low=options.epsilon,
        epsilon_high=options.clip_high,
        use_vllm=True,
        vllm_importance_sampling_correction=options.vllm_importance_sampling_correction,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(tokens.policy), torch.zeros_like(mask), None),
    )
    trainer.accelerator.num_processes = 1
    trainer.accelerator.reduce = lambda value, reduction: value
    centred = logps.scores - logps.scores.mean(1, keepdim=True)
    spread = {
        "group": nanstd(logps.scores, dim=1, keepdim=True) + 1e-4,
        "batch": nanstd(logps.scores) + 1e-4,
        "none": torch.ones(()),
    }
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": (centred / spread[options.scale_rewards]).flatten(),
        "old_per_token_logps": padded(tokens.old),
        "ref_per_token_logps": padded(tokens.reference),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": sampler_ratio(padded(tokens.old), padded(tokens.sampler), mask, options),
    }
    return trainer._compute_loss(model, inputs), trainer._metrics["train"]


TYPES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "dr_grpo", "dapo", "bnpo")),
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"beta": 0.04},
    {"beta": 0.04, "use_bias_correction_kl": True},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none", "vllm_importance_sampling_correction": False},
    {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1},
    {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.9},
    {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 1.05},
    {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.3},
    {"delta": 2.5},
]


@pytest.mark.parametrize(("kind", "variant"), product(TYPES, VARIANTS))
def test_loss_gradient_and_metrics_are_trls(kind: dict[str, Any], variant: dict[str, Any]) -> None:
    logps = groups(apart=0.8 if "delta" in variant else 0.4)
    options = block(**kind, **variant)
    expected, metrics = trl(logps, options)
    (gradient,) = torch.autograd.grad(expected, logps.tokens.policy)
    output = output_of(logps, **kind, **variant)
    (found,) = torch.autograd.grad(output.losses.mean(), logps.tokens.policy)
    assert output.losses.mean().item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-9)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-12)
    shared = output.metrics.keys() & metrics.keys()
    assert shared >= ({"cispo_clip_ratio"} if options.loss_type == "cispo" else {"clip_ratio/region_mean"})
    assert ("kl" in shared) == (options.beta > 0)
    for name in shared:
        assert output.metrics[name].mean().item() == pytest.approx(metrics[name][0], rel=1e-6), name


@pytest.mark.parametrize("kind", TYPES)
def test_in_a_round_of_one_step_the_old_policy_is_the_policy_itself(kind: dict[str, Any]) -> None:
    """The ratios are 1 and have the gradients of log-probs, as for TRL without old log-probs."""
    logps = groups()
    fresh = replace(logps, tokens=replace(logps.tokens, old=None))
    known = replace(logps, tokens=replace(logps.tokens, old=logps.tokens.policy.detach()))
    outputs = [output_of(one, **kind) for one in (fresh, known)]
    gradients = [torch.autograd.grad(one.losses.mean(), logps.tokens.policy)[0] for one in outputs]
    assert torch.equal(outputs[0].losses, outputs[1].losses) and torch.equal(*gradients)
    assert all(one.chosen_rewards.abs().max() == 0 for one in outputs)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_micro_batches_add_up_to_the_step(kind: dict[str, Any], scale: str) -> None:
    """Told the step's means, groups lose in any company what they lose in the whole step."""
    logps = groups()
    tokens, scores = sum(map(sum, LENGTHS)), torch.tensor(SCORES, dtype=torch.float64)
    state = LossState(
        mean_candidates=4.0, mean_tokens=tokens / 3, scores_std=scores.std().item(), max_completion_tokens=LONGEST
    )
    options = block(**kind, scale_rewards=scale, beta=0.04)
    whole = preference_loss(logps, options, LossState(max_completion_tokens=LONGEST))
    parts = [preference_loss(part(logps, rows), options, state) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat([one.losses for one in parts]), whole.losses, rtol=1e-12, atol=1e-14)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(torch.cat([one.metrics[name] for one in parts]), values, rtol=1e-12, atol=1e-14)


def test_completions_of_a_smaller_group_count_as_much_as_others() -> None:
    """grpo is a mean over completions, not over groups; what stands beside the mask is never read."""
    logps = groups()
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1, 2:] = False
    smaller = replace(
        logps,
        tokens=logps.tokens.select(logps.spread(keep), logps.tokens.owners),
        mask=keep,
        scores=logps.scores.masked_fill(~keep, math.nan),
        reference=logps.reference.masked_fill(~keep, math.nan),
    )
    alone = [
        output_of(part(logps, slice(row, row + 1), size), beta=0.04).losses.item() * size
        for row, size in enumerate((4, 2, 4))
    ]
    assert output_of(smaller, beta=0.04).losses.mean().item() == pytest.approx(sum(alone) / 10, rel=1e-12)


def test_advantages_by_hand() -> None:
    """Scores 3, 1, 1 and a filler: mean 5/3, sample std 2/sqrt(3) = 1.1547005."""
    scores, mask = torch.tensor([[3.0, 1.0, 1.0, 99.0]]), torch.tensor([[True, True, True, False]])
    expected = [4 / 3, -2 / 3, -2 / 3, 0]
    for scale, spread, std in (("group", 1.1548005, None), ("none", 1.0, None), ("batch", 2.0001, 2.0)):
        found = advantages(scores, mask, scale, std).tolist()[0]
        assert found == pytest.approx([value / spread for value in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A = (1, -1). Ratios 1.5, 0.5 of the first and 0.7 of the second: -min(1.5, 1.2) and -min(0.5, 0.8) mean -0.85;
        # -min(-0.7, -0.8) = 0.8; mean over the two completions.
        ({}, (-0.85 + 0.8) / 2),
        # Over the three tokens, and over 2 x 12 tokens.
        ({"loss_type": "dapo"}, (-1.2 - 0.5 + 0.8) / 3),
        ({"loss_type": "dr_grpo"}, (-1.2 - 0.5 + 0.8) / 24),
        ({"loss_type": "dapo", "epsilon_high": 0.4}, (-1.4 - 0.5 + 0.8) / 3),
        # -min(c, 1.1) A log pi with log pi = ln 1.5 - 1, ln 0.5 - 2 and ln 0.7 - 1.
        (
            {"loss_type": "cispo", "epsilon_high": 1.1},
            (-1.1 * (math.log(1.5) - 1) - 0.5 * (math.log(0.5) - 2) + 0.7 * (math.log(0.7) - 1)) / 3,
        ),
        # sqrt(1.5 * 0.5) = 0.8660 is between 0.8 and 1.2; 0.7 is cut to 0.8.
        ({"importance_sampling_level": "sequence"}, (-math.sqrt(0.75) + 0.8) / 2),
        # -min(1, 1) and -min(-1, -1) cancel; k3 of the reference at old: c - ln c - 1 of 1/1.5, 1/0.5 and 1/0.7.
        (
            {"epsilon": 0.99, "epsilon_high": 9.0, "beta": 2.0},
            ((-1.0 + 0.7) + 2 * ((2 / 3 + math.log(1.5) - 1 + 2 + math.log(0.5) - 1) / 2 + 1 / 0.7 + math.log(0.7) - 1))
            / 2,
        ),
    ],
)
def test_the_losses_by_hand(options: dict[str, Any], expected: float) -> None:
    old = torch.tensor([-1.0, -2.0, -1.0], dtype=torch.float64)
    logps = groups(((2, 1),), ((1.0, -1.0),))
    policy = old + torch.tensor([1.5, 0.5, 0.7], dtype=torch.float64).log()
    given = replace(logps, tokens=replace(logps.tokens, policy=policy, old=old, reference=old))
    plain = {"scale_rewards": "none", "vllm_importance_sampling_correction": False}
    assert output_of(given, **plain, **options).losses.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.get("loss_type") != "cispo"])
def test_gradients_are_those_of_finite_differences(kind: dict[str, Any]) -> None:
    """cispo's has no potential: its ratio takes no gradient."""
    logps = groups()

    def loss(policy: Tensor) -> Tensor:
        moved = replace(logps, tokens=replace(logps.tokens, policy=policy))
        return output_of(moved, beta=0.1, use_bias_correction_kl=True, **kind).losses

    assert torch.autograd.gradcheck(loss, (logps.tokens.policy,), eps=1e-7, atol=1e-6)


def test_cispos_gradient_is_that_of_weighted_log_probs() -> None:
    logps = groups()
    options = {"loss_type": "cispo", "epsilon_high": 1.2, "vllm_importance_sampling_correction": False}
    (found,) = torch.autograd.grad(output_of(logps, **options).losses.sum(), logps.tokens.policy)
    assert logps.tokens.old is not None
    ratios = (logps.tokens.policy - logps.tokens.old).exp().detach().clamp(max=1.2)
    of_tokens = logps.spread(advantages(logps.scores, logps.mask, "group"))
    torch.testing.assert_close(found, -ratios * of_tokens / (sum(map(sum, LENGTHS)) / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_policies_lose_finite_amounts_with_finite_gradients(dtype: torch.dtype) -> None:
    """Policies some 10 nats a token apart."""
    logps = groups(apart=10.0, dtype=dtype)
    for kind in TYPES:
        losses = output_of(logps, beta=0.01, **kind, delta=None).losses
        (gradient,) = torch.autograd.grad(losses.sum(), logps.tokens.policy)
        assert losses.isfinite().all() and gradient.isfinite().all()


GROUPS = ["pairing.type=group"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{loss_type: dapo, importance_sampling_level: sequence}", "would weigh each completion by its length"),
        ("{loss_type: cispo}", "epsilon_high=None with loss_type=cispo is the largest ratio"),
        ("{loss_type: cispo, epsilon_high: 0.3}", "epsilon_high=0.3 with loss_type=cispo"),
        ("{loss_type: grpo, delta: 1.1}", r"delta=1.1 is not above 1 \+ epsilon_high = 1.2"),
        ("{loss_type: grpo, vllm_importance_sampling_clip_max: 0.5}", "leave out the ratio 1"),
        ("{loss_type: grpo, vllm_importance_sampling_clip_max: null}", "nothing bounds the weights"),
    ],
)
def test_options_that_contradict_each_other_are_refused(loss: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({}, [*GROUPS, f"loss={loss}"])


def test_it_is_trained_on_whole_groups_of_the_policys_samples() -> None:
    config = parse_config({}, [*GROUPS, "loss.loss_type=grpo", "reference.policy=none"])
    assert not config.objective.needs_reference
    with pytest.raises(ConfigError, match="loss_type=grpo reads reference log-probs"):
        parse_config({}, [*GROUPS, "loss={loss_type: grpo, beta: 0.1}", "reference.policy=none"])
    with pytest.raises(ConfigError, match="pairing.type=ranking leaves some out; set pairing.type=group"):
        parse_config({}, ["pairing.type=ranking", "loss.loss_type=grpo"])
    with pytest.raises(ConfigError, match="pairing.weights=margin would weigh the groups of loss.loss_type=grpo"):
        parse_config({}, [*GROUPS, "pairing.weights=margin", "loss.loss_type=grpo"])
    with pytest.raises(ConfigError, match="dr_grpo weighs samples by their probability under the policy, and sampling"):
        parse_config({}, [*GROUPS, "loss.loss_type=dr_grpo", "sampling.temperature=0.8"])
    with pytest.raises(ConfigError, match="use the recipe online_dpo"):
        parse_tree(overridden({"data": {"source": "rows.jsonl"}}, ["loss.loss_type=grpo"]), OfflineDpoConfig, "config")
    parse_config({}, ["pairing.type=group", "loss.loss_type=kto"])
