"""What the kernels run on, and how one begins before the one before it has ended.

From Hopper on a kernel may be launched early, while the one before it still runs (programmatic dependent launch): its
start costs no time then. It must wait before it reads what was written shortly before, or writes anything at all; and
every program of it must, those too that have nothing to do: its end is taken for the end of the one before.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs

EARLY: tl.constexpr = tl.constexpr(
    not knobs.runtime.interpret and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
)


@triton.jit
def wait_for_the_one_before():
    """In a kernel that is `launched_early`."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_the_next_one_begin():
    """In a kernel before one that is `launched_early`: as soon as all its programs have called this."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


def launched_early() -> dict[str, bool]:
    """Options of a launch whose kernel waits by itself."""
    return {"launch_pdl": True} if EARLY.value else {}


@cache
def shared_memory() -> int:
    """Bytes that a program may have for itself on a multiprocessor."""
    if not torch.cuda.is_available():
        return 1 << 16  # under Triton's interpreter, where it does not matter
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
