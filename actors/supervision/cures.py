"""What a person can do about the errors of Ray, vLLM, DeepSpeed and torch, in raylign's own settings."""

import re
from collections.abc import Mapping
from typing import Literal

Role = Literal["generator", "trainer", "scorer", "cluster"]
"""Whose error it is; `cluster` is everything else."""

MEMORY_CURES: Mapping[str, str] = {
    "generator": (
        "lower generators.kv_cache_gb (on GPUs generators.gpu_memory_utilization), generators.max_num_seqs, "
        "generators.max_model_len or generators.count"
    ),
    "trainer": (
        "lower trainer.max_tokens_per_micro_batch or trainer.per_device_train_batch_size (raise "
        "trainer.gradient_accumulation_steps instead), set trainer.gradient_checkpointing=true, raise "
        "trainer.zero_stage, or train an adapter (model.lora.r=16); `raylign plan` shows what takes most"
    ),
    "scorer": "lower scoring.batch_size, or take a smaller scoring model",
    "cluster": "lower trainer.ranks or generators.count",
}
"""By role: what makes it take less memory."""
_CHECK = "`raylign doctor` says what this machine lacks"
_RANKS = "see that the nodes reach each other (firewall, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME), then go on"
_CURES: tuple[tuple[str, str], ...] = (
    (
        r"KV cache|cache blocks|max seq len",
        "raise generators.kv_cache_gb (on GPUs generators.gpu_memory_utilization), or lower generators.max_model_len "
        "or generators.max_num_seqs",
    ),
    (
        r"[Ff]ree memory on device|desired GPU memory utilization",
        "lower generators.gpu_memory_utilization, or end what else is on that GPU",
    ),
    (r"max_model_len", "lower generators.max_model_len"),
    (
        r"CUDA_HOME|CUDAMismatch|MissingCUDA|[Nn]inja|Error building extension|Unable to JIT load|nvcc|C\+\+ compiler"
        r"|compilation failed",
        f"DeepSpeed or vLLM builds code at its first start: {_CHECK}, compiler and ninja among it",
    ),
    (r"NCCL|DistNetworkError|connectFullMesh|[Gg]loo", _RANKS),
    (r"No space left|OutOfDisk|local disk", "free some space on the disk (`df -h` and `df -h /dev/shm`), then go on"),
    (r"object store|ObjectStoreFull", "free shared memory (`df -h /dev/shm`), or lower schedule.prompts_per_round"),
    (
        r"[Vv]ersion mismatch",
        "install the same Ray and Python here as on the cluster, or unset RAY_ADDRESS to use this machine",
    ),
    (
        r"AuthenticationError|[Tt]oken authentication",
        "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN_PATH",
    ),
    (
        r"Could not find any running Ray|[Cc]onnect to GCS|RpcError|\bGCS\b|LocalRayletDied",
        "start the cluster, correct RAY_ADDRESS, or unset it to use this machine",
    ),
    (r"placement group", "somebody removed the run's reservation from the cluster; run the same command again"),
    (r"environment could not be set up|RuntimeEnvSetup", f"{_CHECK}; see the actor logs of that node, then go on"),
)
_MEMORY = re.compile(r"[Oo]ut of memory|OutOfMemory|MemoryError|allocate memory|running low on memory")
_ELSE = "mend what it names, then run the same command again: what is finished is saved"


def cure_of(role: Role, text: str, otherwise: str = _ELSE) -> str:
    """For an error of a role, told by its text; `otherwise` where nothing is known of it."""
    if _MEMORY.search(text):
        return MEMORY_CURES[role]
    return next((cure for pattern, cure in _CURES if re.search(pattern, text)), otherwise)
