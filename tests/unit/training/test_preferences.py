"""Preferences as tensors, and a forward pass as what losses read, by hand."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from raylign.config.losses import (
    EntropyLossBlock,
    FunctionLossBlock,
    KlLossBlock,
    KtoLossBlock,
    LossBlock,
    MixLossBlock,
    OdpoLossBlock,
    SigmoidLossBlock,
)
from raylign.errors import TrainerError
from raylign.losses import LossState, ld_weights, preference_loss
from raylign.records import Candidate, KlSample, Preference, Prompt
from raylign.reference.versions import sampler_logps
from raylign.training.kernels.head import TokenScores
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import (
    PreferenceBatch,
    completions_of,
    loss_input,
    pass_cost,
    preference_batch,
    require_logps,
    to_device,
    token_values,
    with_means,
    without_kl_samples,
)
from raylign.training.sequences import Layout, token_batch


def preference(
    prompt: tuple[int, ...],
    *completions: tuple[int, ...],
    scores: tuple[float, ...] | None = None,
    reference: tuple[float, ...] = (),
) -> Preference:
    """Token t of candidate i was sampled with -(i + 1) * (t + 1) nats."""
    candidates = tuple(
        Candidate("p", i, tokens, tuple(-(i + 1.0) * (t + 1) for t in range(len(tokens))), "", "stop", 0, 0)
        for i, tokens in enumerate(completions)
    )
    ranks = tuple(float(rank) for rank in reversed(range(len(completions))))
    return Preference(Prompt("p", (), prompt), candidates, scores or ranks, (1.0,) * len(completions), reference)


THREE = preference((5, 6), (7, 8, 9), (4,), (3, 2), scores=(0.9, 0.5, 0.1), reference=(-3.0, -1.0, -2.0))
TWO = preference((1, 1, 1), (2,), (3, 4), scores=(2.0, 1.0), reference=(-0.5, -1.5))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_groups_of_different_sizes_are_filled_at_the_end(layout: Layout) -> None:
    batch = preference_batch([THREE, TWO], [1.0, 0.0], layout, pad_id=0)
    assert batch.places.tolist() == [0, 1, 2, 3, 4]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.reference.tolist() == [[-3.0, -1.0, -2.0], [-0.5, -1.5, 0.0]]
    assert batch.lengths.tolist() == [[3, 1, 2], [1, 2, 1]]
    torch.testing.assert_close(batch.scores, torch.tensor([[0.9, 0.5, 0.1], [2.0, 1.0, 0.0]]))
    assert (batch.weights.tolist(), batch.token_weights) == ([1.0, 0.0], None)
    # Each prompt once per candidate, the filler not at all: 3 * 2 + (3 + 1 + 2).
    assert batch.num_tokens == 12
    expected = token_batch([completions_of(THREE), completions_of(TWO)], layout, 0)
    assert batch.tokens.input_ids.tolist() == expected.input_ids.tolist()
    assert batch.tokens.labels.tolist() == [7, 8, 9, 4, 3, 2, 2, 3, 4]
    assert batch.tokens.owners.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (0, [[False, True], [True, False]]),
        (3, [[True, False], [False, False]]),
        (None, [[False, False], [False, False]]),
    ],
)
def test_samples_of_the_reference_are_those_of_its_version(version: int | None, expected: list[list[bool]]) -> None:
    """A filler is nobody's."""
    pair, single = preference((1,), (2,), (3,)), preference((1,), (2,))
    newer = replace(pair.candidates[0], policy_version=3)
    mixed = replace(pair, candidates=(newer, pair.candidates[1]))
    batch = preference_batch([mixed, single], [1.0, 1.0], "shared", 0, reference_version=version)
    assert batch.from_reference.tolist() == expected
    assert loss_input(batch, scored(batch)).from_reference is batch.from_reference


def test_places_skip_the_fillers_of_earlier_groups() -> None:
    batch = preference_batch([TWO, THREE, TWO], [1.0, 1.0, 1.0], "shared", pad_id=0)
    assert batch.places.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert batch.num_tokens == 2 * (6 + 3) + 12


def test_without_reference_log_probs_there_are_zeros() -> None:
    assert preference_batch([preference((1,), (2,), (3,))], [1.0], "shared", 0).reference.tolist() == [[0.0, 0.0]]


def test_whole_numbers_are_fp32_too() -> None:
    batch = preference_batch([preference((1,), (2, 2), (3,), scores=(1, 0), reference=(-3, -2))], [1.0], "shared", 0)
    assert {t.dtype for t in (batch.reference, batch.scores, batch.lengths, batch.weights)} == {torch.float32}


def test_a_preference_weighs_what_its_candidates_do_and_a_filler_nothing() -> None:
    """The mean of 0.5 and 1.5, of 0.25 and 0.25, and a filler."""
    pairs = [replace(TWO, weights=(0.5, 1.5)), replace(TWO, weights=(0.25, 0.25)), replace(TWO, weights=(3.0, 3.0))]
    assert preference_batch(pairs, [1.0, 1.0, 0.0], "shared", 0).weights.tolist() == [1.0, 0.25, 0.0]


def test_tokens_beyond_the_shortest_completion_of_a_group_weigh_less() -> None:
    """3, 1 and 2 tokens share one token, 1 and 2 tokens share one; a pair of 4 and 2 shares two."""
    pair = preference((1,), (2, 3, 4, 5), (6, 7))
    batch = preference_batch([THREE, TWO, pair], [1.0] * 3, "shared", pad_id=0, tail_weight=0.25)
    tail = 0.25
    assert batch.token_weights is not None
    assert batch.token_weights.tolist() == [1, tail, tail, 1, 1, tail, 1, 1, tail, 1, 1, tail, tail, 1, 1]
    assert len(batch.token_weights) == len(batch.tokens.labels)


def test_the_sampler_weighs_tokens_as_the_trainer_does() -> None:
    tail = 0.3
    weights = iter(ld_weights([len(one.token_ids) for one in THREE.candidates], tail).tolist())
    expected = tuple(math.fsum(logp * next(weights) for logp in one.logprobs) for one in THREE.candidates)
    assert sampler_logps(THREE, tail) == expected


@pytest.mark.parametrize(
    ("tail_weight", "expected"),
    [
        (1.0, (-6.0, -2.0, -9.0)),  # -1 - 2 - 3, -2, -3 - 6
        (0.5, (-3.5, -2.0, -6.0)),
        (0.0, (-1.0, -2.0, -3.0)),
    ],
)
def test_the_sampler_sums_its_own_log_probs(tail_weight: float, expected: tuple[float, ...]) -> None:
    assert sampler_logps(THREE, tail_weight) == expected


def test_a_batch_moves_as_a_whole() -> None:
    meta = torch.device("meta")
    for tail_weight in (1.0, 0.5):
        moved = to_device(preference_batch([OWN, TWO], [1.0, 1.0], "shared", 0, tail_weight), meta)
        tensors = [getattr(moved, name) for name in PreferenceBatch.__slots__]
        assert all(value.is_meta for value in tensors if isinstance(value, torch.Tensor))
        assert moved.tokens.labels.is_meta and moved.num_tokens == 21
        assert (moved.token_weights is None) == (tail_weight == 1.0)


def test_every_copy_to_a_gpu_is_from_pinned_memory_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a batch with KL samples has, its tokens and its places among it."""
    gpu, pinned, copies = torch.device("cuda", 0), [], []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        assert any(tensor is one for one in pinned) and device == gpu and non_blocking
        copies.append(tensor)
        return tensor

    batch = preference_batch([OWN, FOREIGN], [1.0, 1.0], "shared", 0, with_kl=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = to_device(batch, gpu)
    of_batch = [value for name in PreferenceBatch.__slots__ if isinstance(value := getattr(moved, name), torch.Tensor)]
    assert moved.kl_samples is not None
    held = [*of_batch, *moved.kl_samples, *moved.tokens[:7]]
    assert len(of_batch) > 7 and len(copies) == len(held)
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in copies}
    assert torch.equal(moved.tokens.labels, batch.tokens.labels)


def scored(batch: PreferenceBatch) -> CompletionScores:
    """Token n has log p = -(n + 1), entropy n / 2 and log sum p^2 = -n."""
    tokens, count = batch.tokens, len(batch.tokens.labels)
    numbers = torch.arange(float(count))
    logps, entropies = (-1 - numbers).requires_grad_(), (numbers / 2).requires_grad_()
    sums = torch.zeros(tokens.completions).index_add(0, tokens.owners, logps)
    return CompletionScores(
        sums, TokenScores(logps, entropies, torch.ones(count), torch.zeros(count), -numbers), tokens.owners
    )


def test_what_losses_read_by_hand() -> None:
    """Completions have the tokens 0-2, 3, 4-5 and 6, 7-8."""
    batch = preference_batch([THREE, TWO], [1.0, 1.0], "shared", pad_id=0)
    scores = scored(batch)
    found = loss_input(batch, scores)
    assert found.policy.tolist() == [[-6, -4, -11], [-7, -17, 0]]
    assert found.entropies.tolist() == [[0.5, 1.5, 2.25], [3, 3.75, 0]]
    assert found.certainty.tolist() == [[-1, -1, -1], [-1, -1, 0]]
    assert found.reference is batch.reference and found.scores is batch.scores and found.mask is batch.mask
    assert not found.certainty.requires_grad
    gradients = torch.autograd.grad(
        found.policy[0, 2] + 10 * found.policy[1, 0] + 6 * found.entropies[0, 0],
        (scores.tokens.logps, scores.tokens.entropies),
    )
    assert [gradient.tolist() for gradient in gradients] == [[0, 0, 0, 0, 1, 1, 10, 0, 0], [2, 2, 2] + [0] * 6]


def test_the_loss_of_a_pair_by_hand() -> None:
    """h = -6 + 3 and -9 + 1: the chosen completion has tokens 0-2, the rejected one 3-4."""
    pair = preference((5, 6), (7, 8, 9), (4, 3), reference=(-3.0, -1.0))
    batch = preference_batch([pair], [1.0], "shared", pad_id=0)
    losses = preference_loss(loss_input(batch, scored(batch)), SigmoidLossBlock(beta=0.1), LossState()).losses
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.1 * (-3 + 8))))


@pytest.mark.parametrize(
    "block",
    [OdpoLossBlock(), MixLossBlock(losses=(SigmoidLossBlock(), EntropyLossBlock()))],
    ids=lambda block: block.loss_type,
)
def test_a_completion_without_any_token_keeps_losses_and_gradients_finite(block: LossBlock) -> None:
    batch = preference_batch([preference((5,), (7,), (), scores=(1, 0), reference=(-1.0, 0.0))], [1.0], "shared", 0)
    scores = scored(batch)
    assert batch.lengths.tolist() == [[1, 1]]
    losses = preference_loss(loss_input(batch, scores), block, LossState()).losses
    (gradient,) = torch.autograd.grad(losses.sum(), scores.tokens.logps)
    assert losses.isfinite().all() and gradient.isfinite().all()


OWN = replace(THREE, kl_sample=KlSample((5, 6), (8, 8), reference_logp=-4.0))
FOREIGN = replace(TWO, kl_sample=KlSample((9, 9, 9, 9), (7,), reference_logp=-0.25))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_kl_samples_stand_behind_their_preferences_and_change_nothing_else(layout: Layout) -> None:
    plain = preference_batch([OWN, FOREIGN], [1.0, 0.0], layout, pad_id=0)
    batch = preference_batch([OWN, FOREIGN], [1.0, 0.0], layout, pad_id=0, with_kl=True)
    assert plain.kl_samples is None and batch.kl_samples is not None
    assert [places.tolist() for places in batch.kl_samples] == [
        [3, 6],
        [0, 1, 2, 4, 5],
        [0, 1, 2, 3, 4, 5, 8, 9, 10],
        [0, 0, 0, 1, 2, 2, 3, 4, 4],
    ]
    assert batch.kl_reference.tolist() == plain.kl_reference.tolist() == [-4.0, -0.25]
    assert batch.tokens.labels.tolist() == [7, 8, 9, 4, 3, 2, 8, 8, 2, 3, 4, 7]
    for name in ("places", "reference", "lengths", "scores", "mask", "weights", "sizes", "num_tokens"):
        one, other = getattr(plain, name), getattr(batch, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    # Shared, the sample to the preference's own prompt costs its tokens alone, the other one its prompt too.
    more = {"shared": 2 + 5, "packed": 2 + 2 + 5}
    if layout != "padded":
        assert batch.tokens.input_ids.numel() - plain.tokens.input_ids.numel() == more[layout]


def test_the_candidates_scores_are_those_without_kl_samples() -> None:
    """Token n of the batch with samples has log p = -(n + 1): the samples' tokens are 6, 7 and 11."""
    batch = preference_batch([OWN, FOREIGN], [1.0, 1.0], "shared", pad_id=0, with_kl=True)
    scores, logratios = without_kl_samples(batch, scored(batch))
    assert logratios.tolist() == [-7 - 8 + 4, -12 + 0.25] and logratios.requires_grad
    assert scores.logps.tolist() == [-6, -4, -11, -9, -21]
    assert scores.tokens.logps.tolist() == [-1, -2, -3, -4, -5, -6, -9, -10, -11]
    assert scores.owners.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]
    found = loss_input(batch, scores, logratios)
    assert found.policy.tolist() == [[-6, -4, -11], [-9, -21, 0]] and found.kl_logratios is logratios
    assert found.entropies.tolist() == [[0.5, 1.5, 2.25], [4, 4.75, 0]]


def test_a_batch_without_kl_samples_is_read_as_it_is() -> None:
    batch = preference_batch([THREE, TWO], [1.0, 1.0], "shared", pad_id=0)
    given = scored(batch)
    scores, logratios = without_kl_samples(batch, given)
    assert scores is given and logratios.tolist() == [0.0, 0.0]


def test_a_preference_costs_its_largest_pass_and_without_a_kl_what_it_did() -> None:
    """OWN has 2 + 6 tokens and FOREIGN 3 + 3; their samples 2 behind the same prompt, and 4 + 1."""
    long = replace(FOREIGN, kl_sample=KlSample((9,) * 20, (7,)))
    kl = MixLossBlock(losses=(SigmoidLossBlock(), KlLossBlock()))
    for loss, costs in ((SigmoidLossBlock(), [8, 6, 6]), (KtoLossBlock(), [8, 6, 21]), (kl, [10, 11, 27])):
        assert [pass_cost(one, "shared", loss) for one in (OWN, FOREIGN, long)] == costs
    assert [pass_cost(one, "packed", kl) for one in (OWN, FOREIGN)] == [12 + 4, 9 + 5]


@pytest.mark.parametrize("loss", [KtoLossBlock(), MixLossBlock(losses=(SigmoidLossBlock(), KlLossBlock()))])
def test_a_kl_sample_that_a_loss_reads_must_be_there_with_its_reference(loss: LossBlock) -> None:
    require_logps([OWN, FOREIGN], loss)
    for missing in (TWO, replace(TWO, kl_sample=KlSample((1,), (2,)))):
        with pytest.raises(TrainerError, match=r"preference 1 \(prompt p\) has no KL sample with a reference log-prob"):
            require_logps([OWN, missing], loss)
        require_logps([OWN, missing], SigmoidLossBlock())


def test_log_probs_by_token_stand_beside_their_tokens() -> None:
    """Samplers' from the candidates, the rest as they were filled in; padding and layout change nothing."""
    old = (((-0.1, -0.2, -0.3), (-0.4,), (-0.5, -0.6)), ((-0.7,), (-0.8, -0.9)))
    groups = [replace(one, old_logprobs=values) for one, values in zip((THREE, TWO), old, strict=True)]
    batch = preference_batch(groups, [1.0, 1.0], "shared", 0)
    found = loss_input(batch, scored(batch)).tokens
    assert found.old is not None and found.sampler is not None and found.reference is None
    torch.testing.assert_close(found.old, torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9]))
    assert found.sampler.tolist() == [-1, -2, -3, -2, -3, -6, -1, -2, -4]
    assert found.owners.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4]
    assert [len(of_group) for of_group in token_values(found.sampler, groups)] == [3, 2]
    assert token_values(found.sampler, groups)[1] == ((-1.0,), (-2.0, -4.0))
    assert preference_batch([groups[0], TWO], [1.0, 1.0], "shared", 0).old is None


def test_sums_are_views_of_the_tokens() -> None:
    batch = preference_batch([THREE, TWO], [1.0, 1.0], "packed", 0, tail_weight=0.5)
    scores = scored(batch)
    found = loss_input(batch, scores)
    logps = scores.tokens.logps.tolist()
    assert found.policy[0, 0].item() == pytest.approx(logps[0] + 0.5 * (logps[1] + logps[2]))
    assert found.policy[1].tolist() == pytest.approx([logps[6], logps[7] + 0.5 * logps[8], 0.0])
    assert found.spread(found.scores).tolist() == pytest.approx([0.9] * 3 + [0.5] + [0.1] * 2 + [2.0] + [1.0] * 2)


SAMPLED = FunctionLossBlock(function="my:loss", needs_samples=True, needs_reference=False, pairs_only=False)


def test_a_loss_that_weighs_samples_is_not_trained_without_their_log_probs() -> None:
    require_logps([THREE, TWO], SAMPLED, steps=1)
    with pytest.raises(TrainerError, match=r"preference 0 .* the round's first policy's log-probs for \[\] of \[3"):
        require_logps([THREE, TWO], SAMPLED, steps=2)
    answers = replace(TWO, candidates=tuple(replace(one, logprobs=()) for one in TWO.candidates))
    with pytest.raises(TrainerError, match=r"preference 1 .* the sampler's log-probs for \[0, 0\] of \[1, 2\]"):
        require_logps([THREE, answers], SAMPLED)
    asking = FunctionLossBlock(function="my:loss", needs_reference_tokens=True, pairs_only=False)
    with pytest.raises(TrainerError, match="has the reference's log-probs for"):
        require_logps([THREE], asking)


def test_means_of_a_step_and_spread_of_a_round() -> None:
    state = with_means(LossState(kl=0.5), [TWO], [THREE, TWO], longest=7)
    assert (state.mean_chosen_tokens, state.mean_candidates, state.mean_tokens) == (1.0, 2.0, 3.0)
    assert (state.kl, state.max_completion_tokens) == (0.5, 7)
    assert state.scores_std == pytest.approx(statistics.stdev([0.9, 0.5, 0.1, 2.0, 1.0]))
