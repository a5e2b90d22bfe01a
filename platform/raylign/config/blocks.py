"""Every block of a recipe. Names follow TRL's options wherever TRL has one; defaults live only here."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raylign.boundary.secrets import holds_secret
from raylign.config.base import Block

Dtype = Literal["bfloat16", "float16", "float32"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]
"""What Python, NumPy, torch and vLLM all take."""
ControlTokens = Literal["keep", "break_up"]
_TAKEN = ("mlflow.db", "mlartifacts")
_OF_REFUSED = ".quarantine.jsonl"
_LONGEST_NAME, _LONGEST_PATH = 255, 3500
"""Bytes; the second leaves room for what stands below a run directory."""
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]


class RunBlock(Block):
    """Who this run is and where its directory stands."""

    name: RunName = "online-dpo"
    """Directory name under `dir`; at most 128 letters, digits, dots, dashes and underscores."""
    dir: Path = Path("runs")
    """Parent of the run directory; shared storage on a cluster of several nodes."""
    seed: Seed = 0
    """Seeds prompts, sampling, adapter initialisation and batch order."""

    @field_validator("name")
    @classmethod
    def name_is_free(cls, name: str) -> str:
        if name.startswith(_TAKEN) or name.endswith(_OF_REFUSED):
            raise ValueError(f"{name!r} is the name of a file of MLflow's or raylign's beside runs; take another one")
        return name

    @field_validator("dir")
    @classmethod
    def dir_can_be_made(cls, folder: Path) -> Path:
        parts = folder.parts
        if parts and parts[0].startswith("~"):
            raise ValueError(f"{str(folder)!r}: nothing puts your home folder in the place of ~ here; write it out")
        if not str(folder).isprintable():
            raise ValueError(f"{str(folder)!r} has control characters in it; take another name")
        if any(len(part.encode()) > _LONGEST_NAME for part in parts) or len(str(folder).encode()) > _LONGEST_PATH:
            raise ValueError(
                f"{str(folder)[:60]!r}... is longer than file systems take ({_LONGEST_NAME} bytes a name, "
                f"{_LONGEST_PATH} in all); take a shorter one"
            )
        return folder


class LoraBlock(Block):
    """A PEFT LoRA adapter (Hu et al. 2021); the base model stays frozen and is the reference."""

    r: PositiveInt = 16
    """Rank of the update."""
    lora_alpha: PositiveInt = 32
    """Scaling numerator: updates are multiplied by lora_alpha / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names, or "all-linear" for every linear layer but the output head."""


class ModelBlock(Block):
    """The policy."""

    path: str = "embedded:smollm2-135m"
    """`embedded:smollm2-135m`, a local folder in transformers format, or a hub id."""
    revision: str | None = None
    """Hub revision; pin it for repeatable runs."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of trainer and generators; master weights are fp32 either way. float16 scales its loss."""
    lora: LoraBlock | None = None
    """Train an adapter (block) or every weight (null)."""
    load_in_4bit: bool = False
    """Keep the trainer's frozen base in 4 bits: QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Needs `lora`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = True
    """Quantise the quantisation constants too (double quantisation)."""
    chat_template: Path | None = None
    """A Jinja file in place of the model's own chat template; null takes the model's."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in `dtype`."""
        return 4 if self.dtype == "float32" else 2

    @property
    def adapter_fits_checkpoint(self) -> bool:
        """Whether the checkpoint under the adapter is the policy: an adapter on 4 bits was trained on another base."""
        return self.lora is not None and not self.load_in_4bit


class PartBlock(Block):
    """Which part of a data set to read."""

    subset: str | None = None
    """Configuration of a hub data set, such as `main`: `name` of datasets.load_dataset, `dataset_config` of TRL."""
    data_dir: str | None = None
    """Folder within a hub data set to read alone, such as `helpful-base`."""
    split: str = "train"
    """Split to read, where the source has splits."""


class PromptsBlock(PartBlock):
    """Where prompts come from. Held-out prompts are never trained on."""

    source: str = "embedded:review-topics"
    """`embedded:review-topics`, a .jsonl/.json/.parquet file, a `save_to_disk` folder, or a hub data set id."""
    column: str = "prompt"
    """Column with a string or a list of chat messages."""
    system: str | None = None
    """System message put before prompts that have none."""
    control_tokens: ControlTokens = "keep"
    """Tokens of the chat template such as `<|im_end|>` in the text of messages: `keep` leaves and counts them, as data
    that talk about templates need; `break_up` writes `< |im_end|>`, so that no row can end its turn or open another."""
    held_out: PositiveInt = 32
    """Prompts kept for evaluation: the source's own held-out split if it has one, else a seeded draw."""
    max_invalid: Fraction = 0.0
    """Share of a split's rows that may be bad and are then left out, listed in quarantine.jsonl; past it, no start."""


class SamplingBlock(Block):
    """How candidates are drawn from the current policy."""

    num_generations: int = Field(4, ge=2)
    """K, candidates per prompt; a preference needs at least two."""
    max_resamples: NonNegativeInt = 0
    """How often prompts whose candidates gave no pair get `num_generations` more in the same round. A judge compares
    them with all earlier ones: of n candidates that is n (n - 1) questions in all."""
    reference_generations: NonNegativeInt = 0
    """How many of them the initial model answers instead: the generators leave the policy's adapter off."""
    max_new_tokens: PositiveInt = 64
    """Completion length limit in tokens; longer completions are marked truncated."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus mass."""
    top_k: NonNegativeInt = 0
    """Keep only the k likeliest tokens; 0 keeps all."""

    @property
    def max_generations(self) -> int:
        """Candidates of one prompt, at most."""
        return self.num_generations * (1 + self.max_resamples)

    @model_validator(mode="after")
    def the_policy_answers_too(self) -> Self:
        if self.reference_generations >= self.num_generations:
            raise ValueError(
                f"reference_generations={self.reference_generations} leaves the policy none of "
                f"num_generations={self.num_generations} candidates; lower the first or raise the second"
            )
        return self


class OffloadBlock(Block):
    """What ZeRO keeps in host memory."""

    optimizer: bool = False
    """Optimizer state in host memory (ZeRO 1-3)."""
    param: bool = False
    """Parameters in host memory (ZeRO 3)."""


class TrainerBlock(Block):
    """The DeepSpeed group. Batch of one optimizer step = ranks x per_device_train_batch_size x accumulation."""

    ranks: PositiveInt = 1
    """Trainer actors, one DeepSpeed rank each."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage (Rajbhandari et al. 2020); at 0 every rank holds all of it, without DeepSpeed."""
    offload: OffloadBlock = OffloadBlock()
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up, to 0 at the end of the run: every round takes the same share of it, whatever its steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm; 0 leaves it alone."""
    per_device_train_batch_size: PositiveInt = 8
    """Preferences per rank and micro-batch, at most."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens per rank and micro-batch, at most: memory. A longer preference is run in pieces of them, twice forward."""
    packing: Literal["shared", "packed", "padded"] = "shared"
    """`shared`: each prompt once for all its candidates; `packed`: once per candidate; `padded`: as rows with padding.
    All three compute the same."""
    gradient_accumulation_steps: PositiveInt = 1
    num_train_epochs: PositiveInt = 1
    """Passes over a round's preferences."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_total_limit: PositiveInt | None = 2
    """Checkpoints to keep, newest first; null keeps one per round."""
    save_steps: PositiveInt | None = None
    """Also save after every group of this many steps; null saves at a round's end, and when a signal stops it."""
    max_skipped_steps: PositiveInt = 3
    """Steps in a row whose loss or gradient is not finite before the run stops; each is skipped and its batch saved."""
    start_timeout_s: PositiveFloat = 600.0
    """Deadline for loading the model and joining the group, in seconds."""
    step_timeout_s: PositiveFloat = 600.0
    """Deadline for one optimizer step, in seconds."""

    @property
    def train_batch_size(self) -> int:
        """Preferences per optimizer step over all ranks."""
        return self.ranks * self.per_device_train_batch_size * self.gradient_accumulation_steps


class WeightSyncBlock(Block):
    """How new weights reach the generators, and how that is verified."""

    transport: Literal["auto", "lora", "shm", "nccl", "ipc"] = "auto"
    """`auto`: shm on CPU; on GPU lora for adapters, else nccl between GPUs and ipc on shared ones. Only lora can serve
    `sampling.reference_generations`."""
    canary_max_gap: PositiveFloat = 0.25
    """Refuse a push when vLLM's mean absolute log-prob gap to the trainer on fixed tokens exceeds this (nats)."""
    timeout_s: PositiveFloat = 300.0
    """Deadline for one publish, in seconds."""


class GeneratorsBlock(Block):
    """The vLLM actors."""

    count: PositiveInt = 1
    """Generator actors, one engine each; prompts are spread over them."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs (or CPU workers) per engine."""
    max_model_len: PositiveInt = 1024
    """Context limit in tokens; prompts longer than it less max_new_tokens are refused before anything starts."""
    max_num_seqs: PositiveInt = 256
    """Sequences an engine decodes at once."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of a GPU that vLLM may take."""
    enable_sleep_mode: bool = True
    """Where generators and trainers share GPUs: engines leave them while trainers work, and trainers while engines
    sample. Without it both stay, so that `gpu_memory_utilization` must leave the trainers their part."""
    kv_cache_gb: PositiveFloat = 2.0
    """KV cache per engine on CPU, in GiB."""
    enforce_eager: bool | None = None
    """Skip compilation and graph capture: starts faster, decodes two to three times slower on GPU. null: on CPU."""
    start_timeout_s: PositiveFloat = 600.0
    """Deadline for an engine to start, in seconds."""
    request_timeout_s: PositiveFloat = 600.0
    """Longest wait without any prompt finishing, in seconds."""
    weight_sync: WeightSyncBlock = WeightSyncBlock()

    def require_room_for_a_prompt(self, option: str, new: int) -> None:
        """`new` tokens, which `option` lets a completion have, are fewer than a sequence. Raises ValueError."""
        if new >= self.max_model_len:
            raise ValueError(
                f"{option}={new} leaves no room for a prompt in generators.max_model_len={self.max_model_len}; "
                "lower the first or raise the second"
            )


class PlacementBlock(Block):
    """What each role takes of the cluster."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: gpu when the cluster has one."""
    mode: Literal["colocated", "disaggregated"] = "colocated"
    """`colocated`: generators and trainers take turns on the same devices; `disaggregated`: each has its own."""
    generator_cpus: PositiveInt = 2
    """CPU cores (and compute threads) of each generator."""
    trainer_cpus: PositiveInt = 2
    """CPU cores (and compute threads) of each trainer rank. On CPUs, ranks of one core each waste the least time."""
    scorer_cpus: NonNegativeFloat = 0.0
    """CPU cores reserved for the scorer; 0 lets it share. Its models compute on as many threads, one at least."""
    scorer_gpus: NonNegativeFloat = 0.0
    """GPUs of the scorer, for scorers that run a model; 0 runs it on CPU. Colocated, a share below 1 is one of the
    first generator's GPU: lower generators.gpu_memory_utilization by what the model takes. Else it is another GPU."""
    gpu_memory_gb: PositiveFloat | None = None
    """Memory of each GPU, in GiB; null asks nvidia-smi where the command runs. `raylign plan` takes it for GPUs that
    are not there."""
    ready_timeout_s: PositiveFloat = 60.0
    """How long to wait for a cluster that can grow before refusing, in seconds."""

    @field_validator("scorer_gpus")
    @classmethod
    def scorer_gpus_are_a_share_of_one_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of them; take {int(gpus)}")
        return gpus


class RecoveryBlock(Block):
    """What happens when an actor dies or hangs."""

    max_restarts: NonNegativeInt = 20
    """Actors (or trainer groups) replaced within `window_s`; one more stops the run with everything saved."""
    window_s: PositiveFloat = 3600.0
    """Restarts longer ago than this, in seconds, no longer count."""
    memory_timeout_s: PositiveFloat = 1800.0
    """An actor that was ended for lack of memory, which others took, is replaced once its node has room; this long, in
    seconds, that is waited for."""
    heartbeat_s: PositiveFloat = 2.0
    """How often waiting roles are asked whether they are alive, in seconds."""
    grace_s: PositiveFloat = 25.0
    """Time to save what is trained after SIGTERM, in seconds; keep it below the cluster's own grace time."""


class CurriculumBlock(Block):
    """Leaves out prompts that teach nothing any more: every candidate is right, or every one is wrong."""

    right_from: float | None = None
    """A prompt is right when all its candidates score at least this; null never leaves out what is right."""
    wrong_to: float | None = None
    """A prompt is wrong when all its candidates score at most this; null never leaves out what is wrong."""
    patience: PositiveInt = 1
    """Times in a row that a drawn prompt must be right, or wrong, before it is left out."""

    @model_validator(mode="after")
    def the_bounds_are_apart(self) -> Self:
        if self.right_from is None and self.wrong_to is None:
            raise ValueError("neither right_from nor wrong_to is set; set one, or leave the curriculum out")
        if self.right_from is not None and self.wrong_to is not None and self.wrong_to >= self.right_from:
            raise ValueError(f"wrong_to={self.wrong_to:g} is not below right_from={self.right_from:g}; lower it")
        return self


class ScheduleBlock(Block):
    """How long the run is."""

    rounds: PositiveInt = 5
    """Rounds of sample, score, prefer, train, publish."""
    prompts_per_round: PositiveInt = 48
    """Prompts drawn per round without replacement, reshuffled when the source is used up."""
    curriculum: CurriculumBlock | None = None
    """Which prompts are no longer drawn; null draws all. With it, those drawn least often come first."""


class TrackingBlock(Block):
    """MLflow. Only the driver talks to it."""

    uri: str | None = None
    """Tracking server or database; null is `mlflow.db` (sqlite) in the parent of the run directory."""
    experiment: str = "raylign"
    traces: bool = True
    """Show every held-out completion, and preferences, as traces with their scores as feedback."""
    traced_preferences: Fraction = 0.1
    """The share of a round's preferences that become traces; 0 for none."""
    registered_model: RunName | None = None
    """Under which name `raylign promote` registers policy versions; runs that share it compete for one champion. null
    is the run's name."""

    @model_validator(mode="after")
    def a_share_of_traces_needs_traces(self) -> Self:
        share = self.traced_preferences
        if not self.traces and share not in (0, type(self).model_fields["traced_preferences"].default):
            raise ValueError(
                f"traced_preferences={share:g} with traces=false: none is made; set traces=true, or leave it out"
            )
        return self

    @field_validator("uri")
    @classmethod
    def uri_carries_no_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and not uri.startswith("sqlite:") and ("@" in uri or holds_secret(uri)):
            raise ValueError(
                "credentials in the URI would be saved with the run; use MLFLOW_TRACKING_USERNAME/_PASSWORD"
            )
        return uri
