"""Prompt sources: read, checked row by row, templated once, split into train and held-out, drawn per round."""

from raylign.prompts.load import PromptSet, draw, load_all, load_prompts
from raylign.prompts.quarantine import InvalidRows, left_out, refused_path, set_aside

__all__ = [
    "InvalidRows",
    "PromptSet",
    "draw",
    "left_out",
    "load_all",
    "load_prompts",
    "refused_path",
    "set_aside",
]
