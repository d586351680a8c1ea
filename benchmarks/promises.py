"""What a training step must keep to, however it keeps its activations, checked on any library.

A library is given as the function that builds its model from couplings. What a step of that
model does is observed in float64, and must be what it does in `nn.Sequential`.
"""

import random
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.couplings import CHANNELS
from revlib import AdditiveCoupling

Build = Callable[..., nn.Module]
Blocks = list[AdditiveCoupling]


def parameter_gradients(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    loss(build(*blocks), x.requires_grad_()).backward()
    return [p.grad for p in parameters(blocks)]


def input_gradient(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    loss(build(*blocks), x.requires_grad_()).backward()
    return [x.grad]


def trained_as_first_layer(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    head = nn.PReLU(dtype=x.dtype)
    loss(nn.Sequential(build(*blocks), head), x).backward()
    return [p.grad for p in parameters(blocks)]


def autograd_grad(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(build(*blocks), x.requires_grad_()), parameters(blocks)))


def batch_norm_statistics(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    loss(build(*blocks), x.requires_grad_()).backward()
    return [buffer.double() for buffer in nn.ModuleList(blocks).buffers()]


def dropout_gradient(build: Build, blocks: Blocks, x: Tensor) -> list[Tensor]:
    """Returns the gradient's slope along a direction over the true one, which should be 1."""
    model = build(*blocks)
    directions = [torch.randn_like(p) for p in parameters(blocks)]

    def loss_at(distance: float) -> Tensor:
        random.seed(0)
        torch.manual_seed(0)
        with torch.no_grad():
            for p, direction in zip(parameters(blocks), directions, strict=True):
                p.add_(direction, alpha=distance)
        return loss(model, x.requires_grad_())

    loss_at(0.0).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters(blocks), directions, strict=True))
    ahead, behind = loss_at(1e-5).detach(), loss_at(-2e-5).detach()
    return [slope / ((ahead - behind) / 2e-5)]


# For each promise: a layer for the sub-networks to contain, and what is observed.
PROMISES = {
    "parameter gradients": (nn.SiLU(), parameter_gradients),
    "input gradient": (nn.SiLU(), input_gradient),
    "trains as the first layer": (nn.SiLU(), trained_as_first_layer),
    "torch.autograd.grad": (nn.SiLU(), autograd_grad),
    "BatchNorm updated once": (nn.BatchNorm2d(CHANNELS // 2), batch_norm_statistics),
    "dropout replayed": (nn.Dropout(0.5), dropout_gradient),
}


def outcomes(build: Build) -> dict[str, str]:
    """Tells of each promise whether it is kept, and if not how it is broken."""
    return {name: outcome(build, *promise) for name, promise in PROMISES.items()}


def outcome(build: Build, layer: nn.Module, observe: Callable[..., list[Tensor]]) -> str:
    c = CHANNELS // 2
    f = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), layer)
    blocks = [AdditiveCoupling(deepcopy(f), deepcopy(f)).double() for _ in range(3)]
    x = torch.randn(4, CHANNELS, 8, 8, dtype=torch.double)

    want = observe(nn.Sequential, deepcopy(blocks), x.clone())
    try:
        got = observe(build, blocks, x.clone())
    except Exception as failure:  # a library may fail in any way
        return f"no: {type(failure).__name__}"
    if None in got:
        return "no: gradients None"
    error = max((torch.dist(g, w) / w.norm()).item() for g, w in zip(got, want, strict=True))
    return "yes" if error < 1e-4 else f"no: error {error:.1g}"


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def parameters(blocks: Blocks) -> list[nn.Parameter]:
    return list(nn.ModuleList(blocks).parameters())
