"""Prompt sources: read, checked row by row, templated once, split into train and held-out, drawn per round."""

from raylign.prompts.draw import draw
from raylign.prompts.load import PromptSet, load_prompts

__all__ = ["PromptSet", "draw", "load_prompts"]
