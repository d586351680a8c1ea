"""Every random number of a run, as a function of the seed and of where the run stands.

The order of an epoch follows from (seed, epoch); crops, mirror images and dropout from
(seed, step, process). So there is no generator whose state a checkpoint could miss: a run
that is resumed at a step draws what the uninterrupted run draws there.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

BORDER = 4


def derive_seed(*key: object) -> int:
    """Returns a seed for the place that `key` names, unrelated to that of any other place.

    Example:
        >>> derive_seed(0, "step", 1) == derive_seed(0, "step", 1)
        True
        >>> derive_seed(0, "step", 1) == derive_seed(1, "step", 0)
        False
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def shuffled(count: int, seed: int) -> Tensor:
    """Returns the numbers below `count` in an order that only `seed` decides.

    Example:
        >>> sorted(shuffled(4, seed=0).tolist())
        [0, 1, 2, 3]
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def augment(x: Tensor) -> Tensor:
    """Crops each image of a batch `[B, C, H, W]` at random out of a border of zeros around it,
    and mirrors every other one, also at random.

    What is random is drawn on the CPU, so that it is the same for every device.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(2 * BORDER + 1, (2, batch, 1))
    mirrored = torch.rand(batch, 1) < 0.5
    rows = (top + torch.arange(height)).to(x.device)
    columns = left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns).to(x.device)
    images = torch.arange(batch, device=x.device)
    padded = F.pad(x, (BORDER,) * 4)
    # The three indices broadcast to [B, H, W]; the channels, not indexed, come last.
    crops = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()
