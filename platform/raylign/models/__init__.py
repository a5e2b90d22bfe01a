"""Model paths to folders, folders to tokenizers and policies."""

from raylign.models.load import DTYPES, context_limit, end_ids, load_policy, load_tokenizer, require_context
from raylign.models.resolve import resolve_model

__all__ = [
    "DTYPES",
    "context_limit",
    "end_ids",
    "load_policy",
    "load_tokenizer",
    "require_context",
    "resolve_model",
]
