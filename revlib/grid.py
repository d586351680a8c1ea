"""The grid of exact arithmetic: how fine it may be, and how far it reaches.

A stream of exact arithmetic is whole steps of 2**-bits. Adding leaves them whole as long as the
mantissa holds them. A float64 that is scaled has to fit, times 2**16, into an integer of 64 bits.
"""

import torch

# What the absolute values of a stream must be below, in steps, where it is added to or scaled.
ADDING_LIMIT = {torch.float32: 2**24, torch.float64: 2**53}
SCALING_LIMIT = {torch.float32: 2**24, torch.float64: 2**46}

# On a finer grid a range would end below 1; that of a float64 that is scaled, below 2**14.
LARGEST_ADDING_BITS = {torch.float32: 23, torch.float64: 52}
LARGEST_SCALING_BITS = {torch.float32: 23, torch.float64: 32}

# A chain's grid, in which all blocks are exact.
BITS = {torch.float32: 12, torch.float64: 32}
