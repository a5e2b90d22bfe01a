"""Keep the memory that PyTorch frees on the CPU: every step needs it again, and the kernel clears it anew."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER = (1 << 31) - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process's allocator hold on to freed memory; False where the C library cannot be told (not glibc).

    Tensors of up to 32 MiB, glibc's limit, are then taken from memory that is mapped already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _M_TRIM_THRESHOLD: _NEVER,
        _M_TOP_PAD: _TOP_PAD,
    }
    return all([bool(mallopt(option, value)) for option, value in settings.items()])
