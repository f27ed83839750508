"""The C library's allocator, in a process that is the command's own."""

import ctypes
import os

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest that glibc takes on 64 bits. What is larger comes from the system, and goes back.
_MMAPPED_FROM = 32 << 20
# Activations of some batches side by side (token_budget.py).
_KEPT_BYTES = 512 << 20
_SETTINGS_OF_USERS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Let what a batch has freed stay with the process for the next one.

    By default glibc gives much of it back to the system, which clears every page anew before the
    next batch gets it. Peak memory is as before; between batches up to 512 MB are kept. Does
    nothing with another C library, and where the environment says something of its own.
    """
    if any(name in os.environ for name in _SETTINGS_OF_USERS) or not _is_glibc():
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _MMAPPED_FROM)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _is_glibc() -> bool:
    names = getattr(os, "confstr_names", {})
    return "CS_GNU_LIBC_VERSION" in names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
