"""Trainer ranks for tests. Each process takes on one rank after another: starting processes is what takes time."""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from actors.calls import actor_class
from actors.supervision.watch import get_all
from actors.trainer.actor import TrainerSpec, free_address
from actors.trainer.group import Rank, TrainerGroup
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import LossBlock, SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock, ReferenceBlock
from raylign.errors import TrainerError
from raylign.records import Candidate, Preference, Prompt
from raylign.roles import TrainerRank
from raylign.run.checkpoints import Metrics

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ("v_proj", "down_proj")}
"""An adapter on one layer of each kind, of attention and of the MLP: others of the same kind would take time alone."""
_START_S = 1200.0
_PORTS = 5
_STEP_S = 1200.0


class _Reused(TrainerRank, Protocol):
    """What `tests.integration.rank_process.Process` has beside a rank's methods."""

    def become(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        """Take on a rank; the one before is gone."""

    def held_bytes(self) -> int:
        """What the tensors of this rank take that could be moved away."""

    def set_loss_scale(self, scale: float) -> None: ...


_Process = actor_class(_Reused, "tests.integration.rank_process:Process")


class Processes:
    """Processes of one group size each, started when they are first asked for."""

    def __init__(self) -> None:
        self._groups: dict[int, list[Any]] = {}

    def start(self, *sizes: int) -> None:
        """Begin to start groups that are not there, at the same time."""
        for ranks in sizes:
            self._of(ranks)

    def _of(self, ranks: int) -> list[Any]:
        if ranks not in self._groups:
            self._groups[ranks] = [_Process.options(num_cpus=0).remote() for _ in range(ranks)]
        return self._groups[ranks]

    def group(self, spec: TrainerSpec) -> TrainerGroup:
        """A trainer group in processes that were another before."""
        handles = self._of(spec.trainer.ranks)
        for attempt in range(_PORTS):
            address, port = free_address()
            refs = [handle.become.remote(spec, rank, address, port) for rank, handle in enumerate(handles)]
            try:
                get_all(refs, _START_S, "becoming ranks", TrainerError)
                break
            except TrainerError as error:
                # Another test may have taken the port meanwhile.
                if attempt == _PORTS - 1 or "already in use" not in str(error):
                    raise
        return group_of(handles, spec)

    def start_ranks(self, spec: TrainerSpec, options: object) -> list[Rank]:
        """In place of `actors.supervision.trainers.start_ranks`."""
        return list(self.group(spec).handles)

    def owns(self, handle: ActorHandle[Any]) -> bool:
        return any(handle in group for group in self._groups.values())

    def end(self, ranks: int) -> None:
        """Whoever asks for a group of that size next gets another."""
        for handle in self._groups.pop(ranks, []):
            ray.kill(handle)


def spec_of(
    folder: str,
    model: Mapping[str, Any],
    trainer: Mapping[str, Any],
    *,
    loss: LossBlock | None = None,
    reference: ReferenceBlock | None = None,
    reference_folder: str = "",
) -> TrainerSpec:
    """float32, beta 0.1, the initial reference and a constant learning rate of 0.01 unless said otherwise."""
    return TrainerSpec(
        folder=folder,
        reference_folder=reference_folder or folder,
        pad_id=2,
        model=ModelBlock.model_validate({"path": folder, "dtype": "float32", **model}),
        trainer=TrainerBlock.model_validate({"learning_rate": 1e-2, "lr_scheduler_type": "constant", **trainer}),
        loss=loss or SigmoidLossBlock(beta=0.1),
        reference=reference or InitialReferenceBlock(),
        rounds=10,
        seed=0,
        threads=1,
        on_gpu=False,
        stacks=tempfile.gettempdir(),
    )


def group_of(handles: Sequence[Any], spec: TrainerSpec) -> TrainerGroup:
    return TrainerGroup(handles, loss=spec.loss, reference=spec.reference, step_timeout_s=_STEP_S)


def _candidate(index: int, token_ids: Sequence[int]) -> Candidate:
    return Candidate("p", index, tuple(token_ids), (-1.25,) * len(token_ids), "", "stop", 0, 0)


def preferences(number: int) -> list[Preference]:
    """Pairs over prompts of 5 to 7 tokens with completions of 3 to 6, every token another and sampled at -1.25 nats."""
    tokens = (1000 + 3 * step for step in count())
    made = []
    for index in range(number):
        prompt = Prompt(f"p{index}", (), tuple(next(tokens) for _ in range(5 + index % 3)))
        pair = tuple(_candidate(i, [next(tokens) for _ in range(3 + (index + i) % 4)]) for i in range(2))
        made.append(Preference(prompt, pair, (1.0, 0.0), (1.0, 1.0)))
    return made


def train_round(group: TrainerGroup, pairs: Sequence[Preference], *, rounds_done: int = 0) -> list[Metrics]:
    """One round as the recipe runs it: reference log-probs, then every step."""
    seed = 3 + rounds_done
    filled = group.with_reference(pairs, seed=seed, rounds_done=rounds_done)
    return list(group.train(filled, seed=seed, rounds_done=rounds_done))
