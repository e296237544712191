"""What the kernels run on."""

import torch
from triton import knobs

# From Hopper on a kernel may be launched while the one before it still runs, and wait for it only when it needs its
# results (programmatic dependent launch): its start costs no time then.
EARLY: bool = not knobs.runtime.interpret and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def launched_early() -> dict[str, bool]:
    """Options of a launch whose kernel waits by itself."""
    return {"launch_pdl": True} if EARLY else {}
