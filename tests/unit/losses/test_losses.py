"""Pairwise, reference-free and unpaired losses against numbers worked out by hand and against plain formulas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from raylign.config.losses import LossBlock, LossUnion, SigmoidLossBlock
from raylign.losses import LossState, next_state, under_new_reference
from tests.unit.losses.sums import CandidateLogps, preference_loss

LOSS_UNION: TypeAdapter[LossBlock] = TypeAdapter(LossUnion)
START = LossState()
LISTWISE = ("kto", "plackett_luce", "list_mle", "list_net", "lambda", "all_pairs_logistic", "all_pairs_hinge", "sft")
REFERENCE_FREE = ("simpo", "alphapo", "cpo", "orpo")
DIFFERENCE = ("sigmoid", "sigmoid_norm", "probit", "robust", "hinge", "ipo", "exo_pair", "discopop")
RATIO = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "odpo", "dpop", "rdpo")
OBJECTIVES = (*DIFFERENCE, *RATIO, *REFERENCE_FREE, *LISTWISE)


def block(loss_type: str, **options: Any) -> LossBlock:
    return LOSS_UNION.validate_python({"loss_type": loss_type, **options})


def candidates(
    policy: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None = None,
    *,
    lengths: Sequence[Sequence[int]] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    certainty: Sequence[Sequence[float]] | None = None,
    from_reference: Sequence[Sequence[bool]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> CandidateLogps:
    """Groups of real candidates only; by default one token each, a zero reference and scores K-1, ..., 0.

    None is a sample of the reference, unless `from_reference` says so.
    """
    leaf = torch.tensor(policy, dtype=dtype, requires_grad=True)
    zeros, ranks = torch.zeros_like(leaf), torch.arange(leaf.shape[1] - 1, -1, -1, dtype=dtype).expand_as(leaf)

    def given(values: Sequence[Sequence[float]] | None, default: Tensor) -> Tensor:
        return default.detach() if values is None else torch.tensor(values, dtype=dtype)

    return CandidateLogps(
        policy=leaf,
        reference=given(reference, zeros),
        lengths=given(lengths, zeros + 1).long(),
        scores=given(scores, ranks),
        mask=torch.ones_like(leaf, dtype=torch.bool),
        entropies=zeros + 0.5,
        certainty=given(certainty, zeros),
        from_reference=given(from_reference, zeros).bool(),
        kl_logratios=torch.zeros(len(leaf), dtype=dtype),
    )


def random_candidates(groups: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> CandidateLogps:
    """Completions of 1 to 9 tokens, a policy near its reference, scores in order without ties."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (groups, size), generator=generator)
    reference = -lengths * (0.2 + torch.rand(groups, size, generator=generator, dtype=dtype))
    policy = (reference + torch.randn(groups, size, generator=generator, dtype=dtype)).clamp_max(-0.05)
    return CandidateLogps(
        policy=policy.requires_grad_(),
        reference=reference,
        lengths=lengths,
        scores=torch.rand(groups, size, generator=generator, dtype=dtype).sort(1, descending=True).values,
        mask=torch.ones(groups, size, dtype=torch.bool),
        entropies=torch.rand(groups, size, generator=generator, dtype=dtype).requires_grad_(),
        certainty=-torch.rand(groups, size, generator=generator, dtype=dtype),
        from_reference=torch.rand(groups, size, generator=generator, dtype=dtype) < 0.5,
        kl_logratios=torch.randn(groups, generator=generator, dtype=dtype).requires_grad_(),
    )


# Log-ratios h of (chosen, rejected) and tokens: row 0 has h = (2, -5) and 5, 8 tokens; row 1 has h = (-1, 2) and 6, 4.
# beta = 0.1 unless a line says otherwise: delta = 0.1 (h_w - h_l) = 0.7 and -0.3.
def hand_made(dtype: torch.dtype = torch.float32) -> CandidateLogps:
    return candidates(
        [[-10.0, -20.0], [-30.0, -8.0]],
        [[-12.0, -15.0], [-29.0, -10.0]],
        lengths=[[5, 8], [6, 4]],
        scores=[[1.0, 0.0], [1.0, 0.5]],
        certainty=[[-0.1, -0.2], [0.4, -0.1]],
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        # ln(1 + e^-0.7), ln(1 + e^0.3)
        ("sigmoid", {}, (0.4031860, 0.8543552)),
        # 0.9 * 0.4031860 + 0.1 * 1.1031860; 0.9 * 0.8543552 + 0.1 * 0.5543552
        ("sigmoid", {"label_smoothing": 0.1}, (0.4731860, 0.8243552)),
        # p = sigmoid(2 * 1) = 0.8807971, sigmoid(2 * 0.5) = 0.7310586; loss = p a + (1 - p) (a +- delta)
        ("sigmoid", {"soft_label_scale": 2.0}, (0.4866281, 0.7736728)),
        # exp(-0.3) = 0.7408182 times the loss; exp(0.3) is cut at 1
        ("sigmoid", {"use_weighting": True}, (0.2986876, 0.8543552)),
        # beta = 5: delta = 5 (0.4 + 0.625) = 5.125, 5 (-1/6 - 0.5) = -10/3
        ("sigmoid_norm", {}, (0.0059286, 3.3683857)),
        # Phi(0.7) = 0.7580363, Phi(-0.3) = 0.3820886
        ("probit", {}, (0.2770239, 0.9621028)),
        # (0.9 * 0.4031860 - 0.1 * 1.1031860) / 0.8; (0.9 * 0.8543552 - 0.1 * 0.5543552) / 0.8
        ("robust", {}, (0.3156860, 0.8918552)),
        ("hinge", {}, (0.3, 1.3)),
        # (1.025 - 5)^2, (-2/3 - 5)^2
        ("ipo", {}, (15.800625, 32.1111111)),
        # q = 0.6681878: q ln(q/0.999) + (1-q) ln((1-q)/0.001); q = 0.4255575
        ("exo_pair", {}, (1.6572916, 3.2865116)),
        # m = sigmoid(14), sigmoid(-6)
        ("discopop", {}, (0.4965852, 0.8555804)),
        # ln(1+e^-0.2) + (ln(1+e^0.2) + ln(1+e^-0.5))/2; the same of r = (-0.1, 0.2)
        ("nca_pair", {}, (1.2342468, 1.4656644)),
        # ln(1+e^-0.2) + ln(1+e^-0.5); ln(1+e^0.1) + ln(1+e^0.2)
        ("bco_pair", {}, (1.0722159, 1.5425355)),
        # (2-5)^2 + (-5+5)^2; (-1-5)^2 + (2+5)^2
        ("sppo_hard", {}, (9.0, 85.0)),
        # sigmoid(-0.2) + sigmoid(-0.5); sigmoid(0.1) + sigmoid(0.2)
        ("apo_zero", {}, (0.8277067, 1.0748132)),
        # sigmoid(0.2) + sigmoid(-0.7); sigmoid(-0.1) + sigmoid(0.3)
        ("apo_down", {}, (0.8816462, 1.0494633)),
        # margins (10, -22) and (3, -19): sorted alike, so as sigmoid
        ("aot", {}, (0.4031860, 0.8543552)),
        # h_w = (2, -1) against h_l sorted (2, -5) in the same ranks: ln 2, ln(1 + e^-0.4)
        ("aot_unpaired", {}, (0.6931472, 0.5130153)),
        # offsets ln 1 = 0, ln 0.5: delta' = 0.7, -0.3 + 0.6931472
        ("odpo", {}, (0.4031860, 0.5157710)),
        # offsets 0.3, 0.15: delta' = 0.4, -0.45
        ("odpo", {"odpo_offset": "linear", "odpo_alpha": 0.3}, (0.5130153, 0.9432490)),
        # row 1 falls by 0.1 * 50 * 1: delta' = -5.3
        ("dpop", {}, (0.4031860, 5.3049792)),
        # delta' = 0.7 - 0.03, -0.3 + 0.02
        ("rdpo", {}, (0.4132405, 0.8429153)),
        # 2 (-2 + 2.5) - 1 = 0, 2 (-5 + 2) - 1 = -7
        ("simpo", {}, (0.6931472, 7.0009115)),
        # alpha 1: 1 - 1/p; 0.1 (e^2.5 - e^2) - 0 = 0.4793438; 0.1 (e^2 - e^5) = -14.1024103
        ("alphapo", {"alpha": 1.0, "beta": 0.1, "simpo_gamma": 0.0}, (0.4819258, 14.1024111)),
        # ln(1 + e^-1), ln(1 + e^2.2) and NLL 10/5.5, 30/5.5
        ("cpo", {}, (2.1314435, 7.7596287)),
        # log odds -2 - ln(1-e^-2) + 2.5 + ln(1-e^-2.5) = 0.5597630; -5, -2: -3.1386528
        ("orpo", {}, (1.8633751, 5.7726536)),
        # (sigmoid(-0.2) + sigmoid(-0.5)) / 2; (sigmoid(0.1) + sigmoid(0.2)) / 2
        ("kto", {}, (0.4138533, 0.5374066)),
        ("sft", {}, (10 / 5.5, 30 / 5.5)),
    ],
)
def test_losses_by_hand(loss_type: str, options: dict[str, Any], expected: tuple[float, float]) -> None:
    output = preference_loss(hand_made(), block(loss_type, **options), START)
    assert output.losses.tolist() == pytest.approx(expected, rel=2e-6)


def test_divergences_by_hand() -> None:
    """h = (2, -5): scores 1 - e^-h, ln 2 + log sigmoid(h), (e^(-h/2) - 1) / -0.5."""
    scores = {
        "forward_kl": (1 - math.exp(-2), 1 - math.exp(5)),
        "js_divergence": (math.log(2 / (1 + math.exp(-2))), math.log(2 / (1 + math.exp(5)))),
        "alpha_divergence": (2 - 2 * math.exp(-1), 2 - 2 * math.exp(2.5)),
    }
    for name, (chosen, rejected) in scores.items():
        loss = preference_loss(hand_made(), block("sigmoid", f_divergence_type=name), START).losses[0]
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * (chosen - rejected))), rel=1e-5), name


def test_a_reward_shift_moves_bco() -> None:
    # r = (0.2, -0.5), (-0.1, 0.2) less 0.3
    losses = preference_loss(hand_made(), block("bco_pair"), LossState(reward_shift=0.3)).losses
    assert losses.tolist() == pytest.approx([1.1154973, 1.5574119], rel=1e-6)


def test_a_kl_moves_ktos_reference_point() -> None:
    # beta (h - 1): sigmoid(-0.1) + sigmoid(-0.6), sigmoid(0.2) + sigmoid(0.1), halved; weights 2 and 1 in the second
    kto = preference_loss(hand_made(), block("kto"), LossState(kl=1.0)).losses
    assert kto.tolist() == pytest.approx([0.4146823, 0.5374066], rel=1e-6)
    weighted = preference_loss(hand_made(), block("kto", desirable_weight=2.0), LossState(kl=1.0)).losses[0]
    assert weighted.item() == pytest.approx((2 * 0.4750208 + 0.3543437) / 2, rel=1e-6)


def test_kto_takes_a_bar_for_what_is_desirable() -> None:
    # Scores 1 and 0 are both above -1: sigmoid(-0.2) and sigmoid(0.5)
    loss = preference_loss(hand_made(), block("kto", desirable_above=-1.0), START).losses[0]
    assert loss.item() == pytest.approx((0.4501660 + 0.6224593) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "chosen", "rejected"),
    [
        *((name, (0.2, -0.1), (-0.5, 0.2)) for name in ("sigmoid", "ipo", "sppo_hard", "aot", "kto", "lambda")),
        ("simpo", (-4.0, -10.0), (-5.0, -4.0)),
        ("cpo", (-1.0, -3.0), (-2.0, -0.8)),
        ("orpo", (-0.2, -0.5), (-0.25, -0.2)),
    ],
)
def test_rewards_are_trls(loss_type: str, chosen: tuple[float, ...], rejected: tuple[float, ...]) -> None:
    output = preference_loss(hand_made(), block(loss_type), START)
    assert output.chosen_rewards.tolist() == pytest.approx(chosen)
    assert output.rejected_rewards.tolist() == pytest.approx(rejected)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_losses_carry_gradients_and_all_else_is_detached(loss_type: str) -> None:
    output = preference_loss(hand_made(), block(loss_type), START)
    assert output.losses.requires_grad and output.losses.shape == (2,)
    detached = (output.chosen_rewards, output.rejected_rewards, *output.metrics.values())
    assert all(not values.requires_grad and values.shape == (2,) for values in detached)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_a_policy_equal_to_its_reference_loses_ln_2_where_the_block_says_so(loss_type: str) -> None:
    logps = random_candidates(4, 2, dtype=torch.float32)
    same = replace(logps, policy=logps.reference.clone().requires_grad_())
    losses = preference_loss(same, block(loss_type), START).losses
    is_ln2 = losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    only_in_lists_of_two = loss_type in ("plackett_luce", "list_mle", "list_net")
    assert block(loss_type).ln2_at_start == (is_ln2 and not only_in_lists_of_two)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def log_odds(p: Tensor) -> Tensor:
    return torch.log(p / (1 - p))


# The papers' formulas without care for overflow: beta, h of chosen and rejected, policy log-probs and lengths of both.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda b, hw, hl, pw, pl, nw, nl: -torch.log(torch.sigmoid(b * (hw - hl))),
    "sigmoid_norm": lambda b, hw, hl, pw, pl, nw, nl: -torch.log(torch.sigmoid(b * (hw / nw - hl / nl))),
    "probit": lambda b, hw, hl, pw, pl, nw, nl: -torch.log(0.5 * torch.erfc(-b * (hw - hl) / math.sqrt(2))),
    "robust": lambda b, hw, hl, pw, pl, nw, nl: (0.9 * softplus(b * (hl - hw)) - 0.1 * softplus(b * (hw - hl))) / 0.8,
    "hinge": lambda b, hw, hl, pw, pl, nw, nl: torch.clamp(1 - b * (hw - hl), min=0),
    "ipo": lambda b, hw, hl, pw, pl, nw, nl: (hw / nw - hl / nl - 1 / (2 * b)) ** 2,
    "discopop": lambda b, hw, hl, pw, pl, nw, nl: (
        softplus(b * (hl - hw)) * (1 - torch.sigmoid(b * (hw - hl) / 0.05))
        + torch.exp(b * (hl - hw)) * torch.sigmoid(b * (hw - hl) / 0.05)
    ),
    "nca_pair": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * hw) + (softplus(b * hw) + softplus(b * hl)) / 2,
    "bco_pair": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * hw) + softplus(b * hl),
    "sppo_hard": lambda b, hw, hl, pw, pl, nw, nl: (hw - 1 / (2 * b)) ** 2 + (hl + 1 / (2 * b)) ** 2,
    "apo_zero": lambda b, hw, hl, pw, pl, nw, nl: 1 - 1 / (1 + torch.exp(-b * hw)) + 1 / (1 + torch.exp(-b * hl)),
    "dpop": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * (hw - hl - 50 * torch.clamp(-hw, min=0))),
    "rdpo": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * (hw - hl) - 0.01 * (nw - nl)),
    "simpo": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * (pw / nw - pl / nl) + 1.0),
    "alphapo": lambda b, hw, hl, pw, pl, nw, nl: softplus(
        -b * (torch.exp(-pl / nl * 0.25) - torch.exp(-pw / nw * 0.25)) / 0.25 + 1.0
    ),
    "cpo": lambda b, hw, hl, pw, pl, nw, nl: softplus(-b * (pw - pl)) - pw / nw.double().mean(),
    "orpo": lambda b, hw, hl, pw, pl, nw, nl: (
        -pw / nw.double().mean() + b * softplus(log_odds(torch.exp(pl / nl)) - log_odds(torch.exp(pw / nw)))
    ),
    "kto": lambda b, hw, hl, pw, pl, nw, nl: (1 - torch.sigmoid(b * hw) + 1 - torch.sigmoid(-b * hl)) / 2,
    "sft": lambda b, hw, hl, pw, pl, nw, nl: -pw / nw.double().mean(),
}


@pytest.mark.parametrize("loss_type", PLAIN)
def test_losses_and_gradients_equal_the_plain_formula_in_float64(loss_type: str) -> None:
    logps, named = random_candidates(32, 2), block(loss_type)
    losses = preference_loss(logps, named, START).losses
    h = logps.policy - logps.reference
    columns = [values[:, index] for values in (h, logps.policy, logps.lengths) for index in (0, 1)]
    plain = PLAIN[loss_type](getattr(named, "beta", 1.0), *columns)
    torch.testing.assert_close(losses, plain, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(losses.sum(), logps.policy)
    expected = torch.autograd.grad(plain.sum(), logps.policy)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("signs", [(0, -1), (-1, 0), (-1, -1), (0, 0)])
@pytest.mark.parametrize("reference_is_far", [False, True])
def test_extreme_values_give_finite_losses_and_gradients(
    loss_type: str, signs: tuple[int, int], reference_is_far: bool
) -> None:
    """|beta delta| up to 1e4 in fp32, completions of one token, probabilities down to 0 and up to 1."""
    for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        options = {"f_divergence_type": name} if loss_type in DIFFERENCE else {}
        named = block(loss_type, **options)
        far = 1e4 / getattr(named, "beta", 1.0)
        logps = candidates([[sign * far for sign in signs]], [[-far * reference_is_far] * 2])
        output = preference_loss(logps, named, START)
        (gradient,) = torch.autograd.grad(output.losses.sum(), logps.policy)
        assert output.losses.isfinite().all() and gradient.isfinite().all(), (name, output.losses, gradient)


@pytest.mark.parametrize(
    ("delta", "loss", "slope"), [(-1e4, 5.0e7, -1e4), (1e4, 0.0, 0.0), (-20.0, 203.91715, -20.04975)]
)
def test_probit_is_right_far_out(delta: float, loss: float, slope: float) -> None:
    """-log Phi(x) ~ x^2/2 + ln(-x sqrt(2 pi)) and its slope ~ x - 1/x for x << 0."""
    logps = candidates([[delta, 0.0]])
    losses = preference_loss(logps, block("probit", beta=1.0), START).losses
    assert losses.item() == pytest.approx(loss, rel=1e-6)
    assert torch.autograd.grad(losses.sum(), logps.policy)[0][0, 0].item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("loss_type", [*DIFFERENCE[:-1], "bco_pair", "dpop", "simpo", "cpo", "plackett_luce", "lambda"])
def test_the_loss_does_not_grow_with_the_margin(loss_type: str) -> None:
    """ipo and exo_pair have their minimum at a finite margin, beyond the one tried here; discopop has a dip below 0."""
    margins = (-50.0, -1.0, 0.0, 0.5, 1.0)
    losses = [preference_loss(candidates([[m - 51, -51.0]]), block(loss_type, beta=0.1), START).losses for m in margins]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("loss_type", [*DIFFERENCE, *RATIO, *LISTWISE[:-1]])
def test_adding_a_constant_to_policy_and_reference_changes_nothing(loss_type: str) -> None:
    logps = random_candidates(8, 2)
    moved = replace(logps, policy=logps.policy - 3, reference=logps.reference - 3)
    before, after = (preference_loss(some, block(loss_type), START) for some in (logps, moved))
    torch.testing.assert_close(before.losses, after.losses)
    torch.testing.assert_close(before.chosen_rewards, after.chosen_rewards)


@pytest.mark.parametrize("loss_type", REFERENCE_FREE)
def test_reference_free_losses_never_read_the_reference(loss_type: str) -> None:
    logps = hand_made()
    broken = replace(logps, reference=torch.full_like(logps.reference, torch.nan))
    outputs = [preference_loss(some, block(loss_type), START) for some in (logps, broken)]
    assert outputs[0].losses.tolist() == outputs[1].losses.tolist()
    assert not block(loss_type).needs_reference


def test_sft_and_nll_divide_by_the_steps_mean_length() -> None:
    losses = preference_loss(hand_made(), block("sft"), LossState(mean_chosen_tokens=20.0)).losses
    assert losses.tolist() == pytest.approx([0.5, 1.5])


def test_the_next_state_follows_the_steps_means() -> None:
    shift = preference_loss(hand_made(), block("bco_pair"), START).metrics["reward_shift"]
    assert shift.tolist() == pytest.approx([-0.15, 0.05])
    running = next_state(LossState(reward_shift=1.0), block("bco_pair", reward_shift_decay=0.9), {"reward_shift": 0.5})
    assert running.reward_shift == pytest.approx(0.95)
    assert next_state(START, block("bco_pair"), {"reward_shift": 0.5}) == START
    mix = block("mix", losses=[{"loss_type": "sigmoid"}, {"loss_type": "bco_pair", "reward_shift_decay": 0.5}])
    assert next_state(START, mix, {"reward_shift": 2.0}) == LossState(reward_shift=1.0)


def test_under_a_new_reference_the_shift_is_what_the_next_preferences_say() -> None:
    before, means = LossState(kl=1.0, reward_shift=3.0), {"reward_shift": -0.25}
    running = block("bco_pair", reward_shift_decay=0.9)
    assert under_new_reference(before, running, means) == LossState(kl=1.0, reward_shift=-0.25)
    assert under_new_reference(before, block("bco_pair"), {}) == under_new_reference(before, block("kto"), {}) == before


def test_the_kl_of_the_step_is_ktos_own_and_the_compared_candidates_are_not_asked() -> None:
    logged = preference_loss(hand_made(), block("kto"), LossState(kl=1.5)).metrics["kl"]
    assert logged.tolist() == [1.5, 1.5]
    assert next_state(LossState(kl=1.5), block("kto"), {"kl": 1.5}) == LossState(kl=1.5)


def test_a_mix_is_the_weighted_sum_with_the_rewards_of_its_first_member() -> None:
    parts: list[dict[str, Any]] = [
        {"loss_type": "ipo", "beta": 0.2},
        {"loss_type": "sigmoid"},
        {"loss_type": "kl"},
        {"loss_type": "entropy"},
    ]
    logps = replace(hand_made(), kl_logratios=torch.tensor([3.0, -1.0]))
    output = preference_loss(logps, block("mix", losses=parts, loss_weights=[0.5, 1.0, 0.01, 0.1]), START)
    ipo, sigmoid = (preference_loss(hand_made(), block(**part), START) for part in parts[:2])
    # k2 of the KL samples: 9 / 2, 1 / 2; every entropy is 0.5
    expected = 0.5 * ipo.losses + sigmoid.losses + 0.01 * torch.tensor([4.5, 0.5]) - 0.05
    torch.testing.assert_close(output.losses, expected)
    assert output.chosen_rewards.tolist() == ipo.chosen_rewards.tolist()
    assert output.metrics["loss/kl"].tolist() == [4.5, 0.5] and output.metrics["kl"].tolist() == [3.0, -1.0]


def test_the_gradient_of_the_kl_term_is_the_reverse_kls() -> None:
    """Over an enumerable distribution: E_pi[grad h^2/2] with pi fixed equals grad sum pi (log pi - log pi_ref)."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    expected = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    penalties = (policy - reference) ** 2 / 2
    found = torch.autograd.grad((policy.exp().detach() * penalties).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_an_entropy_bonus_pushes_entropies_up() -> None:
    logps = random_candidates(3, 2)
    mix = block("mix", losses=[{"loss_type": "sigmoid"}, {"loss_type": "entropy"}], loss_weights=[1.0, 0.2])
    (gradient,) = torch.autograd.grad(preference_loss(logps, mix, START).losses.sum(), logps.entropies)
    assert gradient.tolist() == [[pytest.approx(-0.1)] * 2] * 3


def test_pairwise_losses_refuse_lists() -> None:
    with pytest.raises(ValueError, match="sigmoid compares 2 candidates, not 3; build pairs"):
        preference_loss(random_candidates(2, 3), SigmoidLossBlock(), START)
