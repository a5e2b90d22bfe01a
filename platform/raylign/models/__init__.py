"""Model paths to folders, folders to tokenizers and policies."""

from raylign.models.context import context_limit, require_context
from raylign.models.ends import end_ids
from raylign.models.load import DTYPES, load_policy, load_tokenizer
from raylign.models.resolve import resolve_model
from raylign.reference.checkpoint import resolve_reference

__all__ = [
    "DTYPES",
    "context_limit",
    "end_ids",
    "load_policy",
    "load_tokenizer",
    "require_context",
    "resolve_model",
    "resolve_reference",
]
