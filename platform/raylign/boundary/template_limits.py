"""Tries a chat template within limits: `python -P template_limits.py CPU_SECONDS`, with the template as standard input.

Jinja's sandbox keeps a template from Python's objects, but lets it loop, raise to powers and write as long as it likes,
partly in C code that nothing in the same process can stop. So that it is there at once, this file is the whole
program: it imports jinja2 only. It ends with 0 also for a template that fails: who renders it in earnest says how.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 3
MEMORY = 512 << 20
LONGEST_TEXT = 1 << 20
"""Characters for a conversation of a few words."""
TOO_MUCH_MEMORY, TOO_LONG = 3, 4
"""Exit codes; a process past its CPU seconds ends by a signal."""
_TURNS = (("system", "Be brief."), ("user", "hello"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So."))
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


class _Generation(Extension):
    """Transformers' mark around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers makes it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _written(text: str) -> int:
    """The longest text that the template writes, in characters."""
    template = _environment().from_string(text)
    messages = [{"role": role, "content": content} for role, content in _TURNS]
    longest = 0
    for turns in (messages[1:2], messages[1:3], messages[:2], messages):
        for options in ({"add_generation_prompt": True}, {"tools": [_TOOL]}):
            tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<s>")
            try:
                longest = max(longest, len(template.render(messages=turns, **tokens, **options)))
            except MemoryError:
                raise
            except Exception:
                continue  # it takes no such conversation
    return longest


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> int:
    _limit(resource.RLIMIT_CPU, int(sys.argv[1]))
    _limit(resource.RLIMIT_AS, MEMORY)
    try:
        return TOO_LONG if _written(sys.stdin.buffer.read().decode("utf-8", "surrogatepass")) > LONGEST_TEXT else 0
    except MemoryError:
        return TOO_MUCH_MEMORY
    except Exception:
        return 0


if __name__ == "__main__":
    sys.exit(main())
