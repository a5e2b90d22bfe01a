"""The generator: the actor that drivers name. vLLM is imported where it starts, so that no driver waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from raylign.config.blocks import Dtype
from raylign.records import Candidate, Prompt
from raylign.sampling.decoding import Decoding


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a generator needs to start its engine. Made by `actors.team` from the config."""

    model: str
    dtype: Dtype
    device: Literal["cpu", "gpu"]
    transport: Literal["lora", "shm", "nccl"]
    lora_rank: int
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_gb: float
    enforce_eager: bool
    trust_remote_code: bool
    seed: int
    threads: int
    stacks: str
    """Folder for the stacks that the actor writes when it is asked to."""

    @property
    def one_process(self) -> bool:
        """Whether the engine computes in its own process, with no worker beside it."""
        return self.device == "cpu" and self.tensor_parallel_size == 1


class _Generator:
    """`actors.generator.engine.VllmEngine` in a process of its own."""

    def __init__(self, spec: EngineSpec, name: str) -> None:
        from actors.generator.engine import VllmEngine  # noqa: PLC0415 - vLLM, on the actor's node

        self._engine = VllmEngine(spec, name)

    async def ready(self) -> None:
        """Label the base weights version 0, and open the way for others."""
        await self._engine.ready()

    async def label(self, version: int) -> None:
        """Name the served weights."""
        await self._engine.label(version)

    async def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
        """K candidates of one prompt, in index order. Raises GeneratorError when another version sampled them.

        The last `reference_generations` are those of the base model without the policy's adapter, at the same time.
        """
        return await self._engine.sample(prompt, decoding, seed, version)

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of token_ids[1:] given their prefix, under the served weights."""
        return await self._engine.token_logps(token_ids)

    async def pause(self) -> None:
        """Let requests in flight finish, then hold new ones."""
        await self._engine.pause()

    async def resume(self) -> None:
        """Forget prefixes computed with older weights, then serve again."""
        await self._engine.resume()

    async def take_adapter(self, path: str, version: int) -> None:
        """Serve the PEFT adapter in folder `path` as `version`, replacing the one before."""
        await self._engine.take_adapter(path, version)

    async def take_weights(self, path: str, version: int) -> None:
        """Serve the weights in the safetensors file `path` as `version`."""
        await self._engine.take_weights(path, version)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer_engine(init_info)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._engine.finish_weight_update(weight_version)

    async def version(self) -> int:
        """The policy version the engine serves."""
        return await self._engine.version()

    async def shutdown(self) -> None:
        """End vLLM's processes."""
        await self._engine.shutdown()


Generator: Any = ray.remote(_Generator)
