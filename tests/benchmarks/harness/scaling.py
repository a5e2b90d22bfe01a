"""What `scaling` asks of its contestant and gets back."""

from typing import Literal

from raylign.config.base import Block


class Shape(Block):
    """One step: `preferences` of a prompt and `candidates` completions each, of so many tokens."""

    preferences: int
    candidates: int
    prompt: int
    completion: int

    @property
    def counted(self) -> int:
        """Tokens with the prompt once per completion, as TRL counts."""
        return self.preferences * self.candidates * (self.prompt + self.completion)


class Series(Block):
    """One trainer on a random Llama, and its steps by their place on `axis`, those that need less memory first."""

    name: str
    axis: str
    width: int = 256
    layers: int = 4
    vocabulary: int = 8192
    packing: Literal["shared", "packed", "padded"] = "shared"
    max_tokens: int = 1 << 20
    """Of a micro-batch, or of a piece of a larger preference."""
    shapes: dict[str, Shape]


class ScalingJob(Block):
    """`repeats` steps are timed after one that is not; the fastest counts."""

    series: tuple[Series, ...]
    repeats: int
    threads: int


class Point(Block):
    """One step, reference pass included. Bytes are peaks of the trainer's process.

    `own_bytes`: a step on four tokens, which has all that is the model's own: weights, masters, moments, gradients and
    their buffers. `activation_bytes`: what this step, or one before it in the series, took above that.
    """

    series: str
    axis: str
    at: str
    counted: int
    seconds: float
    gflops: float
    own_bytes: int
    activation_bytes: int


class ScalingResult(Block):
    points: tuple[Point, ...]
