"""Chat templates of others are tried within limits before they are used."""

import signal
import subprocess
import sys
from functools import cache

from raylign.boundary import template_limits
from raylign.errors import ModelError


def require_bounded(template: str, where: str, cure: str) -> None:
    """Raises ModelError for a template that takes too long, too much memory or writes too much for a few words."""
    if excess := _excess(template):
        raise ModelError(f"{where}: the chat template {excess} for a conversation of a few words; {cure}")


@cache
def _excess(template: str) -> str:
    """What the template does too much of, empty if nothing. Raises ModelError when it cannot be tried."""
    tried = subprocess.run(
        [sys.executable, "-P", str(template_limits.__file__), str(template_limits.CPU_S)],
        input=template.encode("utf-8", "surrogatepass"),
        capture_output=True,
        check=False,
    )
    match tried.returncode:
        case 0:
            return ""
        case template_limits.TOO_LONG:
            return f"writes more than {template_limits.LONGEST_TEXT >> 20} Mi characters"
        case template_limits.TOO_MUCH_MEMORY:
            return f"takes more than {template_limits.MEMORY >> 20} MiB"
        case code if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"takes more than {template_limits.CPU_S} s of CPU time"
        case code:
            told = tried.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise ModelError(
                f"a chat template could not be tried: {sys.executable} ended with {code} ({told}); install jinja2 for "
                "that Python, or free memory"
            )
