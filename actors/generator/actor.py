"""The actor of a generator, and what it needs to start its engine."""

from dataclasses import dataclass
from typing import Literal

from actors.calls import actor_class
from actors.weight_sync.transports import EngineEnd
from raylign.config.blocks import Dtype
from raylign.roles import Generator


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a generator needs to start its engine. Made by `actors.team` from the config."""

    model: str
    dtype: Dtype
    device: Literal["cpu", "gpu"]
    transport: EngineEnd
    lora_rank: int
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_gb: float
    enforce_eager: bool
    sleeps: bool
    """Whether trainers need its GPU between samplings."""
    trust_remote_code: bool
    seed: int
    threads: int
    stacks: str
    """Folder for the stacks that the actor writes when it is asked to."""

    @property
    def one_process(self) -> bool:
        """Whether the engine computes in its own process, with no worker beside it."""
        return self.device == "cpu" and self.tensor_parallel_size == 1


GeneratorActor = actor_class(Generator, "actors.generator.engine_process:start_engine")
"""Its arguments are an EngineSpec and the actor's name."""
