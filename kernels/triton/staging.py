"""Small arrays from the host to the device in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: Triton compiles a kernel again for a pointer that is not a multiple of them


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, of their own shapes and dtypes, all of them views of one buffer.

    The copy is queued on the current stream. Its source is pinned, and torch keeps it until the copy is done.
    """
    starts = np.cumsum([0] + [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
    staged = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staged.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staged.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
