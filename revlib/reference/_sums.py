"""Sums over all but the batch, in float32 or wider.

PyTorch's own sum reads each element once, channels_last or not, and adds in a fixed order: 4
bytes for each in float32, and 2 in half precision, which a GPU widens on the way. A kernel would
read as much. (A CPU first copies half precision to float32: 2 + 4 + 4 bytes.)
"""

import torch
from torch import Tensor


def sum_per_sample(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.sum(tuple(range(1, x.ndim)), dtype=dtype)
