"""Preferences above the token budget: the gradients of one pass over all of it, in the memory of a piece."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from raylign.config.losses import (
    EntropyLossBlock,
    GrpoLossBlock,
    KlLossBlock,
    KtoLossBlock,
    LambdaLossBlock,
    LossBlock,
    MixLossBlock,
    PlackettLuceLossBlock,
    PlackettLuceRewardLossBlock,
    SftLossBlock,
    SigmoidLossBlock,
    XpoLossBlock,
)
from raylign.losses import LossOutput, LossState
from raylign.records import Candidate, Completions, KlSample, Preference, Prompt
from raylign.training.batches import MicroBatch, Step
from raylign.training.learners import Learner, PolicyLearner, RewardLearner, Totals
from raylign.training.pieces import add_gradients, of_policy, score
from raylign.training.preferences import PreferenceBatch, in_passes, passes_of, preference_batch
from raylign.training.sequences import Layout, cut, token_cost
from tests.unit.saved_tensors import SavedTensors
from tests.unit.tiny_models import IDS, SMALL, VOCABULARY, tiny

STEP = Step(4, ((MicroBatch((0,), (1.0,)),), (MicroBatch((1,), (1.0,)),)))
"""Of two ranks."""
LOSSES: dict[str, LossBlock] = {
    "plackett_luce": PlackettLuceLossBlock(beta=0.1),
    "lambda": LambdaLossBlock(beta=0.1),
    "kto": KtoLossBlock(beta=0.1),
    "grpo": GrpoLossBlock(loss_type="grpo", beta=0.1),
    "gspo": GrpoLossBlock(importance_sampling_level="sequence"),
    "every term": MixLossBlock(
        losses=(PlackettLuceLossBlock(beta=0.1), SftLossBlock(), KlLossBlock(), EntropyLossBlock(), XpoLossBlock()),
        loss_weights=(1.0, 0.5, 0.25, 0.5, 0.1),
    ),
}


def group(size: int, longest: int = 6, *, foreign_kl: bool = False) -> Preference:
    """A prompt of five tokens with `size` completions of 1 to `longest`, some of which the reference sampled."""
    draw = torch.Generator().manual_seed(size)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    def values(count: int) -> tuple[float, ...]:
        return tuple((-2 - torch.rand(count, generator=draw)).tolist())

    answers = [ids(1 + index % longest) for index in range(size)]
    candidates = tuple(
        Candidate("p", index, answer, values(len(answer)), "", "stop", 0, index % 3)
        for index, answer in enumerate(answers)
    )
    prompt = Prompt("p", (), ids(5))
    kl = KlSample(ids(4) if foreign_kl else prompt.token_ids, ids(3), -9.0, -8.0)
    return Preference(
        prompt,
        candidates,
        tuple(float((size - index) // 2) for index in range(size)),
        (1.5,) * size,
        values(size),
        kl_sample=kl,
        old_logprobs=tuple(values(len(answer)) for answer in answers),
        reference_logprobs=tuple(values(len(answer)) for answer in answers),
    )


class Trainee:
    """Autograd alone; counts passes, keeps what it was told of `last`, and the bytes of each backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = self.training_module = module
        self.lasts: list[bool] = []
        self.passes = {True: 0, False: 0}
        self.saved, self.held = SavedTensors(module), 0
        module.register_forward_pre_hook(lambda *_: self._begin())

    def _begin(self) -> None:
        self.passes[torch.is_grad_enabled()] += 1
        self.saved.start()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.lasts.append(last)
        self.held = max(self.held, self.saved.nbytes)
        torch.autograd.backward(loss)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.module.named_parameters() if p.requires_grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def batch_of(
    preferences: Sequence[Preference], loss: Any, limit: int, *, more: int = 0, layout: Layout = "shared"
) -> PreferenceBatch:
    """In `more` passes than it takes."""
    weights = [1.0] * len(preferences)
    batch = preference_batch(preferences, weights, layout, 0, loss.tail_weight, 0, loss.needs_kl_gradient)
    passes = max(passes_of(one, layout, limit, loss) for one in preferences) + more
    return in_passes(batch, preferences, layout, 0, limit, passes)


def gradients(
    learner: Learner, batch: PreferenceBatch, *, last: bool = True
) -> tuple[Trainee, LossOutput, Totals, dict[str, Tensor]]:
    trainee = Trainee(learner.module())
    state = LossState(kl=0.3, mean_chosen_tokens=3.0, mean_candidates=4.0, mean_tokens=12.0, scores_std=2.0)
    with trainee.saved.counting():
        loss, totals = add_gradients(trainee, learner, batch, state, STEP, last=last)
    return trainee, loss, totals, trainee.gradients()


def require_same(learners: Sequence[Learner], whole: PreferenceBatch, cut_up: PreferenceBatch) -> Trainee:
    """Losses, metrics and gradients of one pass and of several."""
    assert not whole.pieces and len(cut_up.pieces) > 1
    single, loss, totals, expected = gradients(learners[0], whole)
    trainee, found, summed, given = gradients(learners[1], cut_up)
    torch.testing.assert_close(found.losses, loss.losses)
    torch.testing.assert_close(summed.sums, totals.sums, rtol=1e-5, atol=1e-5)
    assert found.metrics.keys() == loss.metrics.keys()
    assert given.keys() == expected.keys() and max(map(len, given)) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)
    assert single.passes == {True: 1, False: 0}
    assert trainee.passes == dict.fromkeys((True, False), len(cut_up.pieces))
    return trainee


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("limit", [1, 14, 40])
def test_pieces_hold_every_completion_once_in_order_within_the_limit(layout: Layout, limit: int) -> None:
    groups = [Completions((1, 2, 3), [(4,) * count for count in (3, 5, 0, 9, 1)]), Completions((7,), [(8, 9), (5,)])]
    pieces = cut(groups, layout, limit)
    held = [(part.prompt, tuple(one)) for piece in pieces for part in piece for one in part.completions]
    assert held == [(part.prompt, tuple(one)) for part in groups for one in part.completions]
    for piece in pieces:
        alone = [len(part.completions) for part in piece] == [1]
        assert alone or sum(token_cost(part, layout) for part in piece) <= limit
    costs = [sum(token_cost(part, layout) for part in piece) for piece in pieces]
    firsts = [len(piece[0].prompt) + len(piece[0].completions[0]) for piece in pieces[1:]]
    if layout != "shared":
        assert all(cost + first > limit for cost, first in zip(costs, firsts, strict=False)), "pieces are full"
    assert len(pieces) == (7 if limit == 1 else len(pieces))
    assert cut(groups, layout, 1000) == [[Completions(part.prompt, list(part.completions)) for part in groups]]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("foreign_kl", [False, True])
def test_64_candidates_in_pieces_have_the_gradients_of_one_pass(name: str, foreign_kl: bool) -> None:
    loss, preferences = LOSSES[name], [group(64, foreign_kl=foreign_kl)]
    model = tiny()
    learners = [PolicyLearner(deepcopy(model), loss) for _ in range(2)]
    whole, cut_up = batch_of(preferences, loss, 1 << 20), batch_of(preferences, loss, 40, more=2)
    trainee = require_same(learners, whole, cut_up)
    assert len(cut_up.pieces) > 6 and trainee.lasts == [False] * (len(cut_up.pieces) - 1) + [True]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_weights_on_tokens_and_pairs_go_with_their_pieces(layout: Layout) -> None:
    loss, preferences = SigmoidLossBlock(beta=0.1, ld_alpha=0.25, use_weighting=True), [group(2, 12)]
    preferences = [replace(preferences[0], candidates=preferences[0].candidates[::-1])]
    model = tiny(tied=True)
    learners = [PolicyLearner(deepcopy(model), loss) for _ in range(2)]
    whole = batch_of(preferences, loss, 1000, layout=layout)
    require_same(learners, whole, batch_of(preferences, loss, 6, layout=layout))


def test_a_reward_model_learns_a_long_ranking_in_pieces() -> None:
    loss, preferences = PlackettLuceRewardLossBlock(), [group(24)]
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, **IDS)
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    learners = [RewardLearner(deepcopy(model), loss) for _ in range(2)]
    require_same(learners, batch_of(preferences, loss, 1000), batch_of(preferences, loss, 30, more=1))


def test_the_gradients_are_those_of_transformers_logits_in_float64() -> None:
    """Plackett-Luce by its equation, every sequence a row of its own: 64 candidates, no two alike in score."""
    model, preference, beta = tiny(), group(64), 0.1
    preference = replace(preference, scores=tuple(float(-index) for index in range(64)))
    wide = deepcopy(model).double()
    rewards = []
    prompt, reference = preference.prompt.token_ids, preference.reference_logps
    for candidate, known in zip(preference.candidates, reference, strict=True):
        logits = wide(input_ids=torch.tensor([[*prompt, *candidate.token_ids]])).logits[0].log_softmax(-1)
        own = [logits[len(prompt) + t - 1, token] for t, token in enumerate(candidate.token_ids)]
        rewards.append(beta * (torch.stack(own).sum() - known))
    ranked = torch.stack(rewards)
    expected = 1.5 * (ranked.flip(0).logcumsumexp(0).flip(0) - ranked).sum() * 2 / STEP.count
    torch.autograd.backward(expected)
    loss = PlackettLuceLossBlock(beta=beta)
    _, _, _, found = gradients(PolicyLearner(model, loss), batch_of([preference], loss, 40))
    for name, parameter in wide.named_parameters():
        assert parameter.grad is not None
        given = found[f"model.{name}"].double()
        torch.testing.assert_close(given, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


class _Dropped(nn.Module):
    """A layer behind dropout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.3)

    def forward(self, hidden: Tensor) -> Tensor:
        dropped: Tensor = self.layer(self.dropout(hidden))
        return dropped


def test_dropout_draws_the_same_in_both_passes() -> None:
    """Against all pieces at once with their graphs, from the same random state."""
    loss, model = LOSSES["plackett_luce"], tiny()
    for layer in model.model.layers:
        layer.mlp.down_proj = _Dropped(layer.mlp.down_proj)
    model.train()
    learners = [PolicyLearner(deepcopy(model), loss) for _ in range(2)]
    batch = batch_of([group(16)], loss, 40)
    one, module = Trainee(learners[0].module()), learners[0].module()
    torch.manual_seed(3)
    expected, _ = learners[0].measure(score(module, batch), batch, LossState())
    torch.autograd.backward((expected.losses * batch.weights).sum() * 2 / STEP.count)
    torch.manual_seed(3)
    _, found, _, given = gradients(learners[1], batch)
    torch.testing.assert_close(found.losses, expected.losses)
    for name, gradient in one.gradients().items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-7)
    torch.manual_seed(4)
    assert not torch.allclose(learners[1].measure(score(module, batch), batch, LossState())[0].losses, found.losses)


def test_memory_is_that_of_a_piece_for_any_number_of_candidates() -> None:
    """Bytes kept for a backward pass, at most: of a prompt of 5 tokens with two completions of one token."""
    loss, most = LOSSES["plackett_luce"], {}
    for size in (2, 4, 16, 64):
        trainee, *_ = gradients(PolicyLearner(tiny(), loss), batch_of([group(size, 1)], loss, 7))
        most[size] = trainee.held
    whole, *_ = gradients(PolicyLearner(tiny(), loss), batch_of([group(64, 1)], loss, 1 << 20))
    assert most[2] > 0 and most[64] < 1.02 * most[2]
    assert whole.held > 8 * most[64]


def test_a_loss_that_is_not_finite_leaves_no_gradient_finite() -> None:
    loss = LOSSES["plackett_luce"]
    broken = replace(group(8), reference_logps=(math.nan,) * 8)
    _, _, _, found = gradients(PolicyLearner(tiny(), loss), batch_of([broken], loss, 20))
    assert found and not any(bool(gradient.isfinite().all()) for gradient in found.values())


def test_scores_of_pieces_are_those_of_one_pass_without_the_fillers() -> None:
    loss, preferences = LOSSES["every term"], [group(7)]
    module = PolicyLearner(tiny(), loss).module()
    with torch.no_grad():
        one = of_policy(score(module, batch_of(preferences, loss, 1000)))
        many = of_policy(score(module, batch_of(preferences, loss, 15, more=3)))
    assert many.owners.tolist() == one.owners.tolist()
    for left, right in zip(chain((one.logps,), one.tokens), chain((many.logps,), many.tokens), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_only_the_last_piece_of_the_last_micro_batch_ends_a_step() -> None:
    loss = LOSSES["plackett_luce"]
    for preferences in ([group(9)], [group(2)]):
        batch = batch_of(preferences, loss, 20)
        trainee, *_ = gradients(PolicyLearner(tiny(), loss), batch, last=False)
        assert not any(trainee.lasts)
