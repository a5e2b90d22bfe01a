"""KTO beside TRL 1.16 on the same rows: its collator and loss on one model, raylign's batches and passes on another."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylign.config.losses import KtoLossBlock
from raylign.losses import LossState, preference_loss
from raylign.pairing import with_mismatched
from raylign.records import Candidate, Preference, Prompt
from raylign.training.batches import MicroBatch, Passes
from raylign.training.logprobs import CompletionLogps
from raylign.training.preferences import loss_input, preference_batch
from raylign.training.sequences import Layout
from tests.unit.losses.test_losses_trl import KTOTrainer, Model, trainer_of
from tests.unit.tiny_models import plain, tiny

Collator: Any = pytest.importorskip("trl.trainer.kto_trainer").DataCollatorForUnpairedPreference


def models() -> tuple[nn.Module, nn.Module]:
    """A reference, and a policy that is a little away from it."""
    reference, policy = tiny(), tiny()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return reference, policy


def rows_of(reference: nn.Module, number: int) -> list[Preference]:
    """Pairs with their reference log-probs, worked out row by row."""
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 50, (count,), generator=generator).tolist())

    rows = []
    for index in range(number):
        prompt = Prompt(f"p{index}", (), ids(3 + index % 3))
        answers = tuple(Candidate(prompt.id, i, ids(2 + (index + 2 * i) % 5), (), "", "stop", 0, 0) for i in range(2))
        logps = tuple(sum(plain(reference, prompt.token_ids, answer.token_ids)) for answer in answers)
        rows.append(Preference(prompt, answers, (1.0, 0.0), (1.0, 1.0), logps))
    return rows


def filled(reference: nn.Module, rows: Sequence[Preference]) -> list[Preference]:
    """With log-probs of the KL samples too."""
    found = []
    for row in rows:
        assert row.kl_sample is not None
        logp = sum(plain(reference, row.kl_sample.prompt_token_ids, row.kl_sample.token_ids))
        found.append(replace(row, kl_sample=replace(row.kl_sample, reference_logp=logp)))
    return found


def trl_loss(policy: nn.Module, rows: Sequence[Preference], beta: float) -> tuple[Tensor, float]:
    """Its loss and its z0. Each pair is two rows to it, which share the pair's mismatched completion."""

    def answer(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logps = policy(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
        taken = logps.gather(2, input_ids[:, 1:, None]).squeeze(2) * (labels[:, 1:] != -100)
        zeros = torch.zeros_like(taken)
        return SimpleNamespace(log_probs=taken, entropy=zeros, mean_logits=zeros, num_correct_tokens=zeros)

    examples = []
    for row in rows:
        assert row.kl_sample is not None
        for place, candidate in enumerate(row.candidates):
            examples.append(
                {
                    "prompt_ids": list(row.prompt.token_ids),
                    "completion_ids": list(candidate.token_ids),
                    "KL_completion_ids": list(row.kl_sample.token_ids),
                    "label": place == 0,
                    "ref_logps": row.reference_logps[place],
                    "ref_KL_logps": row.kl_sample.reference_logp,
                }
            )
    model = Model(answer)
    trainer = trainer_of(
        KTOTrainer,
        model,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    loss = trainer._compute_loss(model, Collator(pad_token_id=0)(examples), False)
    return loss, trainer._metrics["train"]["kl"][0]


def our_loss(policy: nn.Module, rows: Sequence[Preference], layout: Layout, beta: float) -> tuple[Tensor, float]:
    """As the trainer goes about it, in two micro-batches; one has a filler."""
    module = CompletionLogps(policy)
    micro_batches = [MicroBatch((0, 1, 2, 3), (1.0,) * 4), MicroBatch((4, 5, 0), (1.0, 1.0, 0.0))]
    passes = Passes(layout, 0, torch.device("cpu"))
    total, count = passes.kl_totals(module, rows, micro_batches).tolist()
    assert count == len(rows)
    state = LossState(kl=max(0.0, total / count))
    losses = []
    for micro in micro_batches:
        batch = preference_batch([rows[index] for index in micro.indices], micro.weights, layout, 0)
        output = preference_loss(loss_input(batch, module(batch.tokens)), KtoLossBlock(beta=beta), state)
        losses.append((output.losses * batch.weights).sum())
    return torch.stack(losses).sum() / count, state.kl


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_z0_and_the_loss_are_trls_on_the_same_rows(layout: Layout) -> None:
    reference, policy = models()
    rows = filled(reference, with_mismatched(rows_of(reference, 6), 64, seed=0, what="here"))
    own = deepcopy(policy)
    expected, z0 = trl_loss(policy, rows, beta=0.5)
    loss, kl = our_loss(own, rows, layout, beta=0.5)
    assert z0 > 0.01, "a KL of 0 would test nothing"
    assert kl == pytest.approx(z0, rel=1e-4) and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.autograd.backward(expected)
    torch.autograd.backward(loss)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(own.get_parameter(name).grad, parameter.grad, rtol=2e-3, atol=1e-5)
