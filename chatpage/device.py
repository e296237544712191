"""Numbers on their way to a device."""

from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of (nested) numbers on a device, without waiting for what the device does."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
