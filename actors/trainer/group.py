"""N trainer ranks behind one port; every call runs on all of them, because their collectives need all of them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ray.actor import ActorHandle

from actors.calls import ask_all
from actors.supervision.watch import get_together
from raylign.config.losses import TrainerLoss
from raylign.config.reference import NoReferenceBlock, ReferenceBlock, SamplerReferenceBlock
from raylign.errors import TrainerError
from raylign.evaluation.held_out import HeldOut
from raylign.records import Completions, Preference, ReferenceLogps, TokenLogps
from raylign.reference.versions import sampler_logps
from raylign.roles import DeviceLink, Generator, TrainerRank
from raylign.run.checkpoints import Metrics

P = ParamSpec("P")
T = TypeVar("T")
Rank = ActorHandle[TrainerRank]


class AskRanks(Protocol):
    """Asks every rank the same, and returns the answers in rank order."""

    def __call__(
        self,
        ranks: Sequence[Rank],
        timeout_s: float,
        what: str,
        method: Callable[Concatenate[TrainerRank, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        """Raises ActorsLost when one has died or does not answer, TrainerError when one raised."""
        ...


def ask_ranks(
    ranks: Sequence[Rank],
    timeout_s: float,
    what: str,
    method: Callable[Concatenate[TrainerRank, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """Of ranks that are Ray actors."""
    return get_together(ask_all(ranks, method, *args, **kwargs), timeout_s, what, TrainerError)


class TrainerGroup:
    """The DeepSpeed group as the driver sees it. Handle 0 is rank 0."""

    def __init__(
        self,
        handles: Sequence[Rank],
        *,
        loss: TrainerLoss,
        reference: ReferenceBlock,
        step_timeout_s: float,
        ask_ranks: AskRanks = ask_ranks,
    ) -> None:
        self.handles = tuple(handles)
        self._ask_ranks = ask_ranks
        self._loss, self._reference, self._step_timeout_s = loss, reference, step_timeout_s

    def reference_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """Log-probs of the completions of each row under the reference, in order; [] without one."""
        return self._in_order("reference log-probs", TrainerRank.reference_logprobs, rows)

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """The same under the policy before round 1; [] where the trainers hold no adapter, whose base it is."""
        return self._in_order("log-probs of the initial policy", TrainerRank.initial_logprobs, rows)

    def policy_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """The same under the policy as it is, summed over tokens."""
        return self._in_order("log-probs of the policy", TrainerRank.policy_logps, rows)

    def _in_order(
        self,
        what: str,
        method: Callable[[TrainerRank, Sequence[Completions]], list[T]],
        rows: Sequence[Completions],
    ) -> list[T]:
        shares = self._call(what, len(rows), method, rows)
        world = len(self.handles)
        return [shares[index % world][index // world] for index in range(len(rows))] if shares[0] else []

    def with_reference(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> tuple[Preference, ...]:
        """The preferences with the log-probs that the loss reads of others than the policy in training, for all epochs.

        These are the reference's and, where the loss weighs samples, those of the policy as it is. `seed` is that of
        `train`. A reference that follows the policy takes its part of it first; `rounds_done` rounds of the policy
        are trained.
        """
        logps = self._reference_of(preferences, seed, rounds_done)
        filled = [_filled(p, logps[index]) for index, p in enumerate(preferences)]
        if not self._loss.needs_samples:
            return tuple(filled)
        shares = self._call("log-probs of the policy", len(filled), TrainerRank.old_logprobs, filled, seed)
        old = {index: tokens for share in shares for index, tokens in share.items()}
        return tuple(dataclasses.replace(p, old_logprobs=old.get(index, ())) for index, p in enumerate(filled))

    def _reference_of(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> Mapping[int, ReferenceLogps]:
        match self._reference:
            case NoReferenceBlock():
                return {index: ReferenceLogps((0.0,) * len(p.candidates)) for index, p in enumerate(preferences)}
            case SamplerReferenceBlock():
                return {index: self._sampled(p) for index, p in enumerate(preferences)}
        steps = len(preferences)
        shares = self._call(
            "reference log-probs", steps, TrainerRank.reference_candidates, preferences, seed, rounds_done
        )
        return {index: values for share in shares for index, values in share.items()}

    def _sampled(self, preference: Preference) -> ReferenceLogps:
        sample = preference.kl_sample
        tokens = tuple(candidate.logprobs for candidate in preference.candidates)
        return ReferenceLogps(
            sampler_logps(preference, self._loss.tail_weight),
            None if sample is None else sample.sampler_logp,
            tokens if self._loss.needs_reference_tokens else (),
        )

    def evaluate(self, preferences: Sequence[Preference]) -> HeldOut:
        """Loss and rewards of held-out preferences, without a step: nothing that training goes on from is changed.

        `reference_logps` must be filled in (`with_reference`, once for all evaluations) where the loss reads them, and
        may be empty elsewhere. Raises TrainerError when they are missing, or there are no preferences.
        """
        if not preferences:
            raise TrainerError("there are no held-out preferences to evaluate on; give at least one")
        shares = self._call("held-out evaluation", len(preferences), TrainerRank.evaluate, preferences)
        found = {index: values for _, share in shares for index, values in share.items()}
        losses, chosen, rejected = zip(*(found[index] for index in range(len(preferences))), strict=True)
        return HeldOut(shares[0][0], losses, chosen, rejected)

    def train(self, preferences: Sequence[Preference], seed: int, rounds_done: int = 0) -> Iterator[Metrics]:
        """One round's optimizer steps, each yielded with TRL's metrics as it finishes on every rank."""
        for _ in range(self.begin_round(preferences, seed, rounds_done, ())):
            yield self.train_step()

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        """Get ready for the round after `rounds_done` and return its number of steps; `steps` of them are done."""
        return self._call("planning a round", 1, TrainerRank.begin_round, preferences, seed, rounds_done, steps)[0]

    def train_step(self) -> Metrics:
        """The next optimizer step of the round."""
        return self._call("an optimizer step", 1, TrainerRank.train_step)[0]

    def step_indices(self, number: int) -> tuple[int, ...]:
        """Which preferences of the round step `number` (from 0) trains on."""
        return self._call("the plan of a step", 1, TrainerRank.step_indices, number)[0]

    def state_bytes(self) -> int:
        """Disk space that a checkpoint takes, at most."""
        return self._call("the size of a checkpoint", 1, TrainerRank.state_bytes)[0]

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        """Write what training goes on from; returns the metrics of that round's steps so far."""
        return self._call("saving the training state", 1, TrainerRank.save_state, folder, round_index)[0]

    def load_state(self, folder: str) -> None:
        """Go on from what `save_state` wrote."""
        self._call("loading the training state", 1, TrainerRank.load_state, folder)

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] under the policy for each list of ids, from rank 0."""
        return self._call("canary log-probs", 1, TrainerRank.token_logps, token_ids)[0]

    def save_weights(self, path: str) -> None:
        """Write the merged weights to a safetensors file on rank 0's node."""
        self._call("gathering weights", 1, TrainerRank.save_weights, path)

    def save_adapter(self, folder: str) -> None:
        """Write a PEFT adapter into a folder on rank 0's node."""
        self._call("gathering the adapter", 1, TrainerRank.save_adapter, folder)

    def send_weights(
        self, link: DeviceLink, handles: Sequence[ActorHandle[Generator]], workers: int, timeout_s: float
    ) -> None:
        """Send the merged weights to the engines of exactly the generators `handles`, `workers` processes each."""
        address, port = self._call("finding a port", 1, TrainerRank.free_address)[0]
        self._call("sending weights", 1, TrainerRank.send_weights, link, handles, address, port, workers, timeout_s)

    def _call(
        self, what: str, steps: int, method: Callable[Concatenate[TrainerRank, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Every rank's answer. The deadline is that of `steps` optimizer steps."""
        return self._ask_ranks(self.handles, self._step_timeout_s * max(1, steps), what, method, *args, **kwargs)


def _filled(preference: Preference, found: ReferenceLogps) -> Preference:
    filled = dataclasses.replace(preference, reference_logps=found.candidates, reference_logprobs=found.tokens)
    if preference.kl_sample is None or found.kl_sample is None:
        return filled
    return dataclasses.replace(
        filled, kl_sample=dataclasses.replace(preference.kl_sample, reference_logp=found.kl_sample)
    )
