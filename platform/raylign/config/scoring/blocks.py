"""Every scorer that is no composition, as a block."""

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raylign.config.blocks import Dtype, Fraction
from raylign.config.scoring.base import CacheOption, LeafScoringBlock, VariableName, checked_address

FORWARDS = 8
"""Forward passes in one call of a model: completions of like length meet in one of them."""


class ModelScoringBlock(LeafScoringBlock):
    """A model in the scorer actor: on `placement.scorer_gpus`, else on the threads of `placement.scorer_cpus`."""

    dtype: Dtype = "bfloat16"
    """Compute dtype; rewards and log-probs themselves are float32."""
    chat_template: Path | None = None
    """Jinja file in place of the chat template in the model's folder; for models that come without one."""
    batch_size: PositiveInt = 16
    """Completions in one forward pass, at most."""
    max_tokens_per_batch: PositiveInt = 8192
    """Tokens in one forward pass, padding included, at most: memory. A longer completion goes alone."""
    max_length: PositiveInt | None = None
    """Tokens of prompt and completion, at most; null takes the positions of the model. Nothing is cut: what is longer
    stays unscored."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""
    timeout_s: PositiveFloat = 30.0
    """Deadline per completion in seconds; an actor that is past it for its whole batch is replaced."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion and the model's files: `run`, a path that runs may share, or null."""

    @property
    def items_per_call(self) -> int:
        return self.batch_size * FORWARDS


class FunctionScoringBlock(LeafScoringBlock):
    """Scores from a Python function `(prompts, completions) -> list[float | None]`."""

    module: ClassVar[str] = "function"
    type: Literal["function"] = "function"
    function: str = Field("raylign.scoring.vader:compound", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`; runs in the scorer actor. `plan` shows its file and hash."""
    allow_outside: bool = False
    """Take the function from a file outside the working directory and the installed packages."""
    batch_size: PositiveInt = 64
    """Completions per call."""
    timeout_s: PositiveFloat = 10.0
    """Deadline per item in seconds; an item past it is unscored."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion and file of the function: `run`, a path that runs may share, or null."""

    @property
    def title(self) -> str:
        return self.function


ANSWER = "{answer}"
IFEVAL = "ifeval"
"""The column with a row's instructions as JSON, as `raylign.prompts.published` writes it."""


class VerifierScoringBlock(LeafScoringBlock):
    """1 for a completion that has the reference answer of its prompt's row, else 0. No code is ever run.

    `math` compares as mathematics with the Math-Verify library, so that 1/2 is 0.5 and \\frac{1}{2}; it reads the last
    expression of a completion, a boxed one first. Letters and words are no mathematics: take `exact_match` for them,
    which compares text. `regex` looks for `pattern`. `ifeval` checks the instructions of rows as IFEval publishes them,
    strictly and all of a prompt; the parts of the score have the looser accuracies (`raylign.scoring.ifeval`).
    """

    module: ClassVar[str] = "verifier"
    type: Literal["verifier"] = "verifier"
    method: Literal["math", "exact_match", "regex", "ifeval"] = "math"
    """How a completion is compared with the answer."""
    answer_column: str = Field("answer", min_length=1)
    """Column of the prompt's row with the reference answer; an item without one is unscored."""
    extract: str | None = None
    """Regular expression: group 1 (else all) of its last match is the completion's answer, no match scores 0."""
    extract_answer: str | None = None
    """The same for the reference, as `#### (.*)` for GSM8K; a row without a match is unscored."""
    pattern: str | None = None
    """`method: regex` only: scores 1 where it is found; {answer} in it stands for the reference, taken literally."""
    strip: bool = True
    """`exact_match` only: spaces around an answer do not count, and inside it one is as good as many."""
    casefold: bool = True
    """`exact_match` only: capitals do not count."""
    batch_size: PositiveInt = 64
    """Completions per call of the verifying process."""
    timeout_s: PositiveFloat = 5.0
    """Deadline per item in seconds; an item past it is unscored."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by completion and answer: `run`, a path that runs may share, or null."""

    @field_validator("extract", "extract_answer", "pattern")
    @classmethod
    def patterns_compile(cls, pattern: str | None) -> str | None:
        try:
            re.compile((pattern or "").replace(ANSWER, "x"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); correct it") from error
        return pattern

    @model_validator(mode="after")
    def pattern_goes_with_regex(self) -> Self:
        if self.method == "regex" and self.pattern is None:
            raise ValueError("method=regex needs pattern, for example pattern='Answer: {answer}$'")
        if self.method != "regex" and self.pattern is not None:
            raise ValueError(
                f"pattern={self.pattern!r} is for method=regex, not {self.method}; use extract to find answers"
            )
        return self

    @model_validator(mode="after")
    def instructions_have_their_own_column(self) -> Self:
        patterns = {"extract": self.extract, "extract_answer": self.extract_answer}
        extra = [name for name, pattern in patterns.items() if pattern is not None]
        if self.method == "ifeval" and (self.answer_column != "answer" or extra):
            raise ValueError(
                f"{' and '.join(extra) or f'answer_column={self.answer_column}'} with method=ifeval, which reads the "
                "instructions of IFEval's rows and the whole completion; leave it out"
            )
        return self

    @property
    def reference_column(self) -> str:
        """Where a row has what its completions are compared with."""
        return IFEVAL if self.method == "ifeval" else self.answer_column

    @property
    def needs_answer(self) -> bool:
        """Whether the reference answer decides the score."""
        return self.method != "regex" or ANSWER in (self.pattern or "")

    @property
    def title(self) -> str:
        return f"verifier by {self.method}"


class HttpScoringBlock(LeafScoringBlock):
    """Scores from a reward service that takes a batch by POST.

    `protocol: raylign` sends {"prompts": [[messages]], "completions": [text], "labels": [value or null]} and reads
    {"scores": [number or null], "reasons": [text]}; the reasons, for null or for a number, may be left out.
    `openrlhf` sends {"query": [prompt and completion], "prompts": [text], "labels": [value or null]} and reads
    {"rewards": [number]}.
    """

    module: ClassVar[str] = "http_service"
    type: Literal["http"] = "http"
    url: str
    """Where to post; no credentials in it."""
    protocol: Literal["raylign", "openrlhf"] = "raylign"
    """What is sent and read."""
    chat_template: Path | None = None
    """`openrlhf` only: Jinja file that makes text of a prompt's messages; null puts a blank line between them."""
    label_column: str = "answer"
    """Column of the prompt's row that is sent as its label; null is sent for rows without it."""
    api_key_env: VariableName = "REWARD_API_KEY"
    """Environment variable with the key (sent as a bearer token), on the scorer's node; unset sends no key."""
    concurrency: PositiveInt = 4
    """Requests under way at once."""
    retries: NonNegativeInt = 2
    """Further tries of a request that failed in passing."""
    timeout_s: PositiveFloat = 60.0
    """Deadline of one request in seconds; also the longest that a server may ask to wait (Retry-After)."""
    batch_size: PositiveInt = 32
    """Completions per request."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    cache: CacheOption = "run"
    """Keeps scores by conversation, completion, label and url: `run`, a path that runs may share, or null."""

    @field_validator("url")
    @classmethod
    def url_is_an_address_without_credentials(cls, url: str) -> str:
        return checked_address(url, "the path", "http://127.0.0.1:5000/get_reward")

    @model_validator(mode="after")
    def messages_stay_messages_unless_the_protocol_wants_text(self) -> Self:
        if self.chat_template is not None and self.protocol != "openrlhf":
            raise ValueError(
                f"chat_template={self.chat_template} is for protocol=openrlhf; protocol={self.protocol} sends "
                "messages, so leave chat_template out"
            )
        return self

    @property
    def title(self) -> str:
        return "reward service"

    @property
    def items_per_call(self) -> int:
        return self.batch_size * self.concurrency


class JudgeScoringBlock(LeafScoringBlock):
    """Scores from a language model behind an OpenAI-compatible endpoint: a vLLM server, OpenAI, ... .

    The candidates of one prompt are compared in pairs, in both orders: a score is a share of wins in 0..1. A candidate
    that stands alone (held-out evaluation) is rated from 1 to 10, mapped to 0..1. The two scales do not compare.
    """

    is_judge: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    module: ClassVar[str] = "judge"
    type: Literal["judge"] = "judge"
    base_url: str
    """Address of the server up to and with `/v1`; no credentials in it."""
    model: str = Field(min_length=1)
    """Name of the judge as the server knows it."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """Environment variable with the key, on the scorer's node; without that variable no key is sent."""
    criterion: str = Field(
        "The better answer does what the conversation asks for, and is correct, complete, clear and to the point.",
        min_length=1,
    )
    """What makes an answer better, in words."""
    reasons: bool = False
    """Ask for a short reason before each choice, as chain-of-thought judges do (Zheng et al. 2023, arXiv 2306.05685):
    it stands beside the score in tables and traces. An answer takes some hundred tokens instead of a few."""
    temperature: NonNegativeFloat = 0.0
    """0 lets the judge answer greedily."""
    canaries: bool = True
    """Ask questions with known answers first; a judge that fails them is refused."""
    concurrency: PositiveInt = 8
    """Requests under way at once."""
    retries: NonNegativeInt = 2
    """Further tries of a request that failed or whose answer is no verdict."""
    timeout_s: PositiveFloat = 30.0
    """Deadline of one request in seconds; also the longest that a server may ask to wait (Retry-After)."""
    batch_size: PositiveInt = 32
    """Completions per call; those of one prompt stay together, even where they are more."""
    max_unscored: Fraction = 0.2
    """The round stops when more than this share of candidates is unscored."""
    price_in: NonNegativeFloat | None = None
    """US dollars per million tokens asked; with `price_out` it gives `cost_usd`."""
    price_out: NonNegativeFloat | None = None
    """US dollars per million tokens answered."""
    cache: CacheOption = "run"
    """Keeps every verdict: `run`, a path that runs may share, or null, which asks all of them again about a prompt that
    is sampled again. Above temperature 0 the first verdicts stay.
    """

    @field_validator("base_url")
    @classmethod
    def base_url_is_an_address_without_credentials(cls, base_url: str) -> str:
        return checked_address(base_url, "/v1", "http://127.0.0.1:8000/v1")

    @model_validator(mode="after")
    def a_cost_needs_both_prices(self) -> Self:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError(
                f"price_in={self.price_in} and price_out={self.price_out} give no cost; set both, or neither"
            )
        return self

    @property
    def title(self) -> str:
        return f"judge {self.model}"


class RewardModelScoringBlock(ModelScoringBlock):
    """Scores from a sequence classifier of transformers with one output.

    It reads the conversation with the completion as the last message, by its own tokenizer and chat template.
    """

    module: ClassVar[str] = "reward_model"
    is_model: ClassVar[bool] = True
    type: Literal["reward_model"] = "reward_model"
    path: str = Field(min_length=1)
    """A local folder, such as `raylign export` writes, or a hub id: a whole model, or a PEFT adapter (SEQ_CLS)."""
    revision: str | None = None
    """Hub revision; pin it for repeatable runs."""

    @property
    def title(self) -> str:
        return f"reward model {self.path}"


class ImplicitScoringBlock(ModelScoringBlock):
    """The implicit reward of DPO: beta (log pi(y|x) - log pi_ref(y|x)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    The partition term of eq. 5 is the same for all completions of a prompt and left out. Any two checkpoints with one
    tokenizer will do; a policy after DPO and the model it started from are a reward model for free.
    """

    module: ClassVar[str] = "implicit"
    is_model: ClassVar[bool] = True
    type: Literal["implicit"] = "implicit"
    policy_path: str = Field(min_length=1)
    """pi: a local folder or a hub id, of a whole model or a PEFT adapter (CAUSAL_LM). Its tokenizer is used."""
    policy_revision: str | None = None
    """Hub revision of the policy."""
    reference_path: str = Field(min_length=1)
    """pi_ref, with the policy's tokenizer. The base of a policy's adapter is loaded once for both."""
    reference_revision: str | None = None
    """Hub revision of the reference."""
    beta: PositiveFloat = 0.1
    """Scale of the log-ratio, as in the loss."""
    length_normalised: bool = False
    """Divide by the completion's tokens, its end token included; the sum grows with length."""

    @property
    def title(self) -> str:
        return f"implicit reward of {self.policy_path} against {self.reference_path}"


LeafBlock = (
    FunctionScoringBlock
    | JudgeScoringBlock
    | VerifierScoringBlock
    | HttpScoringBlock
    | RewardModelScoringBlock
    | ImplicitScoringBlock
)
"""Every scorer that is no composition."""
