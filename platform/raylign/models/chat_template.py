"""A chat template from a file of the user's."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from raylign.boundary.templates import require_bounded
from raylign.errors import ModelError
from raylign.reading.files import read_text

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template raises: its own errors, and Python's for what it does with a conversation."""
_CHAT = [{"role": "user", "content": "hello"}]
_LONGEST = 1 << 20
"""Bytes of a template."""


def read_chat_template(path: Path) -> str:
    """The template, which must write a user's message and say where the answer begins. Raises ModelError."""
    text = read_template(path)
    if _rendered(path, text, False) == _rendered(path, text, True):
        raise ModelError(
            f"{path}: the template writes nothing for add_generation_prompt, so that no answer would begin; correct "
            "model.chat_template"
        )
    return text


def read_template(path: Path) -> str:
    """The template of a model that only reads conversations, which must write a user's message. Raises ModelError."""
    try:
        text = read_text(path, _LONGEST)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read ({error}); give a Jinja file in UTF-8 (model.chat_template)"
        ) from error
    if "hello" not in _rendered(path, text, False):
        raise ModelError(f"{path}: the template does not write the user's message; correct model.chat_template")
    return text


def _rendered(path: Path, template: str, generation: bool) -> str:
    require_bounded(template, str(path), "correct model.chat_template")
    try:
        rendered: tuple[list[str], Any] = render_jinja_template(  # type: ignore[assignment]
            conversations=[_CHAT],
            chat_template=template,
            add_generation_prompt=generation,
            bos_token="",
            eos_token="",
            pad_token="",
            unk_token="",
        )
    except TEMPLATE_ERRORS as error:
        raise ModelError(f"{path}: not a chat template ({error}); correct model.chat_template") from error
    return rendered[0][0]
