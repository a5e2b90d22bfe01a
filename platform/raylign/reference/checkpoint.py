"""The checkpoint of the reference, and whether it reads the policy's token ids."""

from raylign.config.blocks import ModelBlock
from raylign.config.reference import ModelReferenceBlock, ReferenceBlock
from raylign.errors import ModelError
from raylign.models.open import embedding_rows, open_tokenizer
from raylign.models.resolve import resolve_model

_CURE = "take a reference that was trained from the same base model, so that token ids mean the same to both"


def resolve_reference(block: ReferenceBlock, model: ModelBlock, folder: str) -> str:
    """Folder of the reference's weights: `folder`, the policy's, unless `block` names another checkpoint.

    Raises ModelError when that is not there, or has another vocabulary.
    """
    if not isinstance(block, ModelReferenceBlock):
        return folder
    found = resolve_model(block.path, block.revision, option="reference")
    require_same_vocabulary(folder, found, model.trust_remote_code)
    return found


def require_same_vocabulary(policy: str, reference: str, trust: bool) -> None:
    """Raises ModelError unless the reference knows every token of the policy by the same id.

    Embeddings may be padded to different sizes.
    """
    rows, known_rows = embedding_rows(reference, trust), embedding_rows(policy, trust)
    tokens, known = _tokens(reference, trust), _tokens(policy, trust)
    if tokens is None or known is None:
        if rows != known_rows:
            raise ModelError(
                f"reference.path: {reference} has {rows} embedding rows, the policy {known_rows}, and there are no "
                f"two tokenizers to compare; {_CURE}"
            )
        return
    if unknown := sorted(known.items() - tokens.items(), key=lambda item: item[1]):
        raise ModelError(
            f"reference.path: {reference} has another vocabulary of {len(tokens)} tokens: {len(unknown)} of the "
            f"policy's {len(known)} are not in it, first {unknown[0][0]!r} with id {unknown[0][1]}; {_CURE}"
        )
    if rows <= max(known.values()):
        raise ModelError(
            f"reference.path: {reference} has {rows} embedding rows, too few for the policy's token ids up to "
            f"{max(known.values())}; {_CURE}"
        )


def _tokens(folder: str, trust: bool) -> dict[str, int] | None:
    """Ids by token; None where there is no tokenizer."""
    try:
        return dict(open_tokenizer(folder, trust).get_vocab())
    except ModelError:
        return None
