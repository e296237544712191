"""Where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is imported.

Here and not beside the kernels' tests, since transformers imports Triton, and most other tests import transformers.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
