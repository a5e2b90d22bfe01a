"""raylign: iterative online preference optimisation. Pure: imports no ray, vllm or deepspeed."""

__version__ = "0.1.0"
