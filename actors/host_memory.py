"""Keep the memory that PyTorch frees on the CPU: every step needs it again, and the kernel clears it anew."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_LARGEST = (1 << 31) - 1
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process's allocator hold on to freed memory; False where the C library cannot be told (not glibc).

    All threads share one heap, which gives back only what lies free above 2 GiB at its end: no tensor gets a mapping of
    its own, which would go back to the kernel with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: _LARGEST, _M_TOP_PAD: _TOP_PAD}
    return all([bool(mallopt(option, value)) for option, value in settings.items()])
