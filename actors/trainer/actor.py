"""The actor of a trainer rank, and what it needs to load what it trains."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from actors.calls import actor_class
from raylign.boundary.imports import lean_imports
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.roles import TrainerRank
from raylign.run.sources import KeptSources


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank needs to load what it trains. Made by recipes and `actors.team` from the config.

    `loss` says what that is: a policy, or a reward model, which has no reference.
    `code` has the sources of losses of the user's by their `module:function`.
    `max_completion_tokens` is where sampling stops, None where nothing is sampled.
    `reference_folder` is the model of `reference`, which is `folder` unless another checkpoint is named.
    """

    folder: str
    reference_folder: str
    pad_id: int
    model: ModelBlock
    trainer: TrainerBlock
    loss: TrainerLoss
    reference: ReferenceBlock
    rounds: int
    seed: int
    threads: int
    on_gpu: bool
    stacks: str
    max_completion_tokens: int | None = None
    code: Mapping[str, KeptSources] = field(default_factory=dict)


def start_rank(spec: TrainerSpec, rank: int, address: str, port: int) -> TrainerRank:
    """A rank that has joined its group and loaded what it trains."""
    unused = () if spec.model.load_in_4bit else ("bitsandbytes",)
    with lean_imports(*unused):
        import torch  # noqa: PLC0415

        from actors.trainer.rank import DeepSpeedRank  # noqa: PLC0415 - DeepSpeed

        if spec.model.lora is not None:
            from peft.import_utils import is_bnb_4bit_available  # noqa: PLC0415

            is_bnb_4bit_available()  # once for the process: an adapter loads bitsandbytes where it is found
    # Engines start on the same cores: threads that wait for one another there take twice as long as half of them.
    torch.set_num_threads(max(1, spec.threads // 2))
    return DeepSpeedRank(spec, rank, address, port)


TrainerActor = actor_class(TrainerRank, "actors.trainer.actor:start_rank")
"""Its arguments are a TrainerSpec, the rank, and the address and port where the group meets."""


def free_address() -> tuple[str, int]:
    """This node's address and a port nobody listens on; another process may still take it first."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
