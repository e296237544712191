"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter (see `tests/conftest.py`)."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(
    not ON_GPU, reason="needs a GPU: Triton's interpreter knows no graphs and streams, and is too slow for so much"
)
