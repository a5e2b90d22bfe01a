"""A verifier in whose C code no alarm is heard; test_verifier.py runs it."""

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.records import Score


def verify(answers: Sequence[str], completions: Sequence[str], rules: Mapping[str, Any]) -> list[Score]:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    if "hang" in completions:
        time.sleep(60)
    return [Score(1.0) for _ in completions]
