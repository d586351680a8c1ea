"""What the benchmarks of exactness share: gradients of a step, and how far they are off."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import revlib
from revlib import ReversibleSequential
from revlib.autograd import Policy

PRECISIONS = {"float32": None, "bf16 autocast": torch.bfloat16}

# How blocks' activations are got back, and whether by exact arithmetic.
METHODS: dict[str, tuple[Callable[[int], Policy | list[Policy]], bool]] = {
    "float": (lambda depth: "rebuild", False),
    "float, anchored every 32": (lambda depth: revlib.anchored(depth, every=32), False),
    "exact": (lambda depth: "rebuild", True),
}


# What a stored run itself is off by.
YARDSTICK = "store, from float64"


def twins(
    blocks: Iterable[nn.Module], chain: type[ReversibleSequential], method: str
) -> tuple[ReversibleSequential, ReversibleSequential]:
    """Returns a chain whose blocks are rebuilt, and one of the same blocks that stores."""
    blocks = list(blocks)
    policy, exact = METHODS[method]
    return (
        chain(*blocks, policy=policy(len(blocks)), exact=exact),
        chain(*blocks, policy="store", exact=exact),
    )


def gradients(
    loss: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Returns the gradients of all parameters, under autocast if a dtype is given.

    They are read where backward leaves them: other libraries return none to `autograd.grad`, and
    train nothing if the input needs no gradient.
    """
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        y = loss(x)
    y.backward()
    return [p.grad for p in model.parameters()]


def worst_error(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """Returns the relative error of the parameter whose gradient is worst."""
    errors = [
        torch.dist(g.double(), w.double()) / w.double().norm()
        for g, w in zip(got, want, strict=True)
    ]
    return torch.stack(errors).max().item()  # a NaN stays one
