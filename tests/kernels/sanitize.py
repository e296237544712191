"""A few small cases of each kernel, for tools that watch every access to memory.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.kernels.sanitize

Slow with either, but the kernels are compiled as they always are.
"""

import os
from random import Random

# Each tensor gets memory of its own, else what lies outside one lies inside another, and is no error.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from chatpage.kernels.copy import BlockCopier
from chatpage.kernels.store import store
from tests.kernels import test_between, test_copy
from tests.kernels.case import Case, draw_rows
from tests.kernels.conftest import DEVICE, ON_GPU
from tests.kernels.test_attention import FORMS, paged

CHOSEN = ["plain", "groups of 4", "groups of 2 on 3", "values are smaller", "widest", "odd blocks", "window of one"]


def main() -> None:
    if DEVICE == "cpu":
        print("No GPU here: there is nothing to watch in Triton's interpreter, but the cases run.")
    dtypes = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
    for dtype in dtypes:
        _store(dtype)
        test_between.test_add_and_norm(96, dtype)
        test_between.test_angles(40, dtype)
        test_between.test_heads_are_turned_and_stored(dtype, 80, True)
        memories = test_copy.pools(8, dtype)
        test_copy.check(memories, BlockCopier(memories), [(1, 2), (2, 3), (9, 1), (30, 30)])
        for name in CHOSEN:
            for shared in (True, False):
                form = FORMS[name]
                rows = draw_rows(Random(name), form.block_size, rows=6, longest=100, chunk=20)
                Case.make(form, rows, device=DEVICE, dtype=dtype).check(paged(shared))
    test_between.test_inputs_are_widened_and_tokens_fetched(5, 300)
    if ON_GPU:
        torch.cuda.synchronize()
    cases = f"{2 * len(CHOSEN)} cases of attention in {len(dtypes)} dtypes"
    print(f"what is between products, store, copy and {cases}: all answers are right")


def _store(dtype: torch.dtype) -> None:
    """The pool's last slot and first one, and one that is skipped."""
    keys = torch.zeros(32, 3, 80, device=DEVICE, dtype=dtype)
    values = torch.zeros(32, 3, 24, device=DEVICE, dtype=dtype)
    key = torch.randn(4, 3, 80, device=DEVICE, dtype=dtype)
    value = torch.randn(4, 3, 24, device=DEVICE, dtype=dtype)
    slots = torch.tensor([31, -1, 0, 17], device=DEVICE)
    store(key, value, keys, values, slots)
    kept = slots >= 0
    assert torch.equal(keys[slots[kept]], key[kept])
    assert torch.equal(values[slots[kept]], value[kept])


if __name__ == "__main__":
    main()
