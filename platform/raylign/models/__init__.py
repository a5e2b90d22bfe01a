"""Model paths to folders, folders to tokenizers and policies."""

from raylign.models.open import context_limit, end_ids, load_tokenizer, require_context
from raylign.models.resolve import resolve_model

__all__ = ["context_limit", "end_ids", "load_tokenizer", "require_context", "resolve_model"]
