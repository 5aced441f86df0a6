"""Memory that a process keeps once it has it: a training step frees and asks again for the same large blocks.

glibc gives large blocks back to the system each time, and every page is then made anew and zeroed: of a ViT-S step of
four images that is 300,000 page faults, more than a gigabyte. The other libcs are left as they are.
"""

from __future__ import annotations

import ctypes

# malloc.h; a threshold of 2 GiB is the largest that an int holds.
M_TRIM_THRESHOLD, M_MMAP_MAX, LARGEST = -1, -4, 2**31 - 1


def keep_freed() -> bool:
    """From now on freed memory stays with this process; False where its libc has no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*setting) == 1 for setting in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST)))
