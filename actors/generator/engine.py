"""One vLLM engine that samples candidates and serves one policy version at a time."""

import asyncio
import functools
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

import ray
from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from actors.generator.actor import EngineSpec
from actors.generator.engine_process import forked_from_preloaded
from actors.supervision.processes import enable_stack_dumps
from actors.weight_sync.vllm_worker import WORKER_EXTENSION
from raylign.errors import GeneratorError
from raylign.records import Candidate, Prompt
from raylign.roles import Generator, NodePath
from raylign.sampling.decoding import Decoding, policy_versions

log = logging.getLogger(__name__)
_ADAPTER = "policy"
_HEARTBEAT_S = 0.5
_GIB = 1 << 30
_CPU_BATCH_TOKENS = 16384
_ENGINE_ERROR = re.compile(r"^\(EngineCore[^)]*\) ERROR [^\]]*\] (\w[\w.]*(?:Error|Exception): .*)", re.MULTILINE)
_SAID = 250
"""Characters of it that are told."""
_CPU_BLOCK = 32
"""Tokens of a KV-cache block, the fewest that vLLM takes on CPUs: candidates share whole blocks of their prompt."""


def engine_args(spec: EngineSpec) -> AsyncEngineArgs:
    """vLLM's arguments for `spec`."""
    options: dict[str, Any] = {}
    if spec.tensor_parallel_size > 1:
        # Inside a placement group vLLM would ask Ray for its workers; the actor has all their devices itself.
        options |= {"distributed_executor_backend": "mp"}
    if spec.device == "cpu":
        # A per-request seed kills the CPU engine when a prefill is chunked.
        options |= {"enable_chunked_prefill": False, "kv_cache_memory_bytes": int(spec.kv_cache_gb * _GIB)}
        options |= {"max_num_batched_tokens": max(_CPU_BATCH_TOKENS, spec.max_model_len)}
        options |= {"block_size": _CPU_BLOCK}
        options |= {"distributed_executor_backend": "uni"} if spec.one_process else {}
    else:
        options |= {"gpu_memory_utilization": spec.gpu_memory_utilization, "enable_sleep_mode": spec.sleeps}
    if spec.transport.backend is None:
        options |= {"enable_lora": True, "max_loras": _slots(spec), "max_lora_rank": _supported_rank(spec.lora_rank)}
    else:
        options |= {"weight_transfer_config": WeightTransferConfig(backend=spec.transport.backend)}
        options |= {"worker_extension_cls": WORKER_EXTENSION}
    return AsyncEngineArgs(
        model=spec.model,
        dtype=spec.dtype,
        tensor_parallel_size=spec.tensor_parallel_size,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        enforce_eager=spec.enforce_eager,
        trust_remote_code=spec.trust_remote_code,
        seed=spec.seed,
        disable_log_stats=True,
        **options,
    )


def _slots(spec: EngineSpec) -> int:
    """Adapters that the engine has room for: the policy's.

    On CPUs vLLM (pull request 48421) computes requests without an adapter with that in the last slot, which therefore
    stays empty: its zeros change nothing.
    """
    return 2 if spec.device == "cpu" else 1


def _supported_rank(rank: int) -> int:
    """vLLM reserves LoRA buffers for a power of two from 8 up."""
    return max(8, 1 << (rank - 1).bit_length())


def _said_by_engine() -> str:
    """The last error that the engine's process wrote into the logs of this actor; vLLM passes on that there is one."""
    logs = [path for number in (1, 2) if (path := Path(f"/proc/self/fd/{number}").resolve()).is_file()]
    found = [error for path in logs for error in _ENGINE_ERROR.findall(path.read_text(errors="replace"))]
    return str(found[-1])[:_SAID] if found else ""


P = ParamSpec("P")
T = TypeVar("T")


def _leaves_with_engine(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """End this process when its engine is dead: Ray sees an actor without an engine as healthy."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except EngineDeadError as error:
            _leave(error)

    return call


def _leave(error: BaseException) -> NoReturn:
    log.error("the engine is dead: %s", error)
    os._exit(1)


class VllmEngine:
    """Samples, scores fixed tokens for the canary, and takes new weights. One asyncio loop, many requests at once.

    `raylign.roles.Generator` tells of its methods.
    """

    def __init__(self, spec: EngineSpec, name: str) -> None:
        self._spec = spec
        enable_stack_dumps(spec.stacks, name)
        try:
            with forked_from_preloaded() if spec.one_process else nullcontext():
                self._engine = AsyncLLM.from_engine_args(engine_args(spec))
        except RuntimeError as error:
            raise RuntimeError(f"vLLM's engine cannot start: {_said_by_engine() or error}") from error
        self._adapter: LoRARequest | None = None
        self._requests = 0
        self._transfer_open = self._updating = False
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def _leave_with_the_engine(self) -> None:
        """Also when nobody calls it, or a call to the dead engine hangs."""
        while not self._engine.errored:
            await asyncio.sleep(_HEARTBEAT_S)
        if not self._closing:
            _leave(self._engine.dead_error)

    @_leaves_with_engine
    async def ready(self) -> None:
        self._tasks.append(asyncio.create_task(self._leave_with_the_engine()))
        if self._spec.transport.opens_itself:
            await self.init_weight_transfer_engine({})
        await self.label(0)

    @_leaves_with_engine
    async def label(self, version: int) -> None:
        await self._engine.update_weight_version(str(version))

    @_leaves_with_engine
    async def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
        count = decoding.reference_generations
        if count and self._spec.transport.backend is not None:
            raise GeneratorError(
                f"{count} candidates were asked of the model without its adapter, but "
                f"generators.weight_sync.transport={self._spec.transport.name} merges the two; use lora"
            )
        own = decoding.num_generations - count
        parts = [self._completions(prompt, decoding, own, seed, self._adapter)]
        parts += [self._completions(prompt, decoding, count, seed + own, None)] if count else []
        completions = [completion for part in await asyncio.gather(*parts) for completion in part]
        for completion in completions:
            _require_version(prompt, completion, version)
        places = enumerate(zip(completions, policy_versions(decoding, version), strict=True))
        return [_candidate(prompt, completion, index, seed + index, of) for index, (completion, of) in places]

    async def _completions(
        self, prompt: Prompt, decoding: Decoding, count: int, seed: int, adapter: LoRARequest | None
    ) -> list[CompletionOutput]:
        """`count` completions of one request; the i-th has the seed `seed + i`."""
        params = SamplingParams(
            n=count,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            max_tokens=decoding.max_new_tokens,
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(list(prompt.token_ids), params, adapter)
        if len(output.outputs) != count:
            raise GeneratorError(f"prompt {prompt.id}: vLLM returned {len(output.outputs)} candidates, not {count}")
        return sorted(output.outputs, key=lambda completion: completion.index)

    @_leaves_with_engine
    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        output = await self._run(list(token_ids), params, self._adapter)
        if output.prompt_logprobs is None:
            raise GeneratorError("vLLM returned no prompt log-probs for the canary")
        rows = output.prompt_logprobs[1:]
        return [row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True) if row is not None]

    async def _run(self, token_ids: list[int], params: SamplingParams, adapter: LoRARequest | None) -> RequestOutput:
        """Without `adapter` the model answers as it was loaded."""
        self._requests += 1
        final: RequestOutput | None = None
        stream = self._engine.generate(
            {"prompt_token_ids": token_ids}, params, f"request-{self._requests}", lora_request=adapter
        )
        async for output in stream:
            final = output
        if final is None or not final.finished:
            raise GeneratorError(f"request of {len(token_ids)} prompt tokens ended without a result")
        return final

    @_leaves_with_engine
    async def pause(self) -> None:
        await self._engine.pause_generation(mode="wait", clear_cache=True)

    @_leaves_with_engine
    async def resume(self) -> None:
        if not await self._engine.reset_prefix_cache():
            raise GeneratorError("vLLM refused to reset its prefix cache after a weight push")
        await self._engine.resume_generation()

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """After an error requests stay held: what the engine then computes with is unknown."""
        await self.pause()
        yield
        await self.resume()

    @_leaves_with_engine
    async def take_adapter(self, folder: NodePath, version: int) -> None:
        path = _on_this_node(folder)
        request = LoRARequest(_ADAPTER, 1, path, load_inplace=True)
        async with self._paused():
            if not await self._engine.add_lora(request):
                raise GeneratorError(f"vLLM did not take the adapter of version {version}")
            self._adapter = LoRARequest(_ADAPTER, 1, path)
            await self.label(version)

    @_leaves_with_engine
    async def take_weights(self, file: NodePath, version: int) -> None:
        async with self._paused():
            await self.start_weight_update()
            await self.update_weights({"path": _on_this_node(file)})
            await self.finish_weight_update(str(version))

    @_leaves_with_engine
    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._require_whole()
        if self._transfer_open:
            await self._engine.shutdown_weight_transfer_engine()
        self._transfer_open = True
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    @_leaves_with_engine
    async def start_weight_update(self) -> None:
        self._require_whole()
        self._updating = True
        await self._engine.start_weight_update()

    @_leaves_with_engine
    async def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info))

    @_leaves_with_engine
    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._engine.finish_weight_update(weight_version)
        self._updating = False

    def _require_whole(self) -> None:
        """vLLM has no way out of an update that was cut off: who sends again meets a new engine in this one's place."""
        if self._updating:
            _leave(GeneratorError("a weight update was cut off"))

    @_leaves_with_engine
    async def sleep(self, level: Literal[1, 2]) -> None:
        await self._engine.sleep(level, mode="wait")

    @_leaves_with_engine
    async def wake_up(self, tags: Sequence[str]) -> None:
        await self._engine.wake_up(list(tags))

    @_leaves_with_engine
    async def version(self) -> int:
        return int(await self._engine.get_weight_version())

    async def shutdown(self) -> None:
        self._closing = True
        await asyncio.get_running_loop().run_in_executor(None, self._engine.shutdown)


_: type[Generator] = VllmEngine


def _on_this_node(found: NodePath) -> str:
    return found.elsewhere.get(ray.get_runtime_context().get_node_id(), found.path) if found.elsewhere else found.path


def _require_version(prompt: Prompt, completion: CompletionOutput, version: int) -> None:
    """The engine names the adapter's version, also in answers without the adapter."""
    spans = completion.weight_versions or []
    found = sorted({span.version for span in spans})
    if found != [str(version)] and completion.token_ids:
        raise GeneratorError(f"prompt {prompt.id}: tokens sampled by version {', '.join(found)}, expected {version}")


def _candidate(prompt: Prompt, completion: CompletionOutput, index: int, seed: int, version: int) -> Candidate:
    token_ids = tuple(completion.token_ids)
    if completion.logprobs is None:
        raise GeneratorError(f"prompt {prompt.id}: vLLM returned no log-probs")
    rows = zip(completion.logprobs, token_ids, strict=True)
    logprobs = tuple(row[token].logprob for row, token in rows if row is not None)
    match completion.finish_reason:
        case "stop" | "length" | "abort" as reason:
            return Candidate(
                prompt_id=prompt.id,
                index=index,
                token_ids=token_ids,
                logprobs=logprobs,
                text=completion.text,
                finish_reason=reason,
                policy_version=version,
                seed=seed,
            )
        case other:
            raise GeneratorError(f"prompt {prompt.id}: vLLM ended a candidate with {other!r}")
