"""Model paths to folders, folders to tokenizers and policies."""

from raylign.models.load import context_limit, load_policy, load_tokenizer
from raylign.models.resolve import resolve_model

__all__ = ["context_limit", "load_policy", "load_tokenizer", "resolve_model"]
