"""How far the gradients of a rebuilt step are from float64, against those of a stored step.

Rebuilding rounds once more per block, so its streams drift from what they were. The activation
is smooth here: ReLUs flip where a stream has moved at all, and would hide the drift.

Run:    make bench
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.couplings import CHANNELS, make_blocks
from revlib import ReversibleSequential


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(model(x).square().mean(), (x, *model.parameters())))


def relative_error(got: Tensor, want: Tensor) -> float:
    return (torch.dist(got.double(), want) / want.norm()).item()


@pytest.mark.parametrize("depth", [8, 16, 32, 64])
@pytest.mark.benchmark(group="gradient error")
def bench_gradient_error(benchmark, depth, device):
    blocks = make_blocks(depth, device, activation=nn.SiLU)
    x = torch.randn(4, CHANNELS, 16, 16, device=device)
    truth = gradients(nn.Sequential(*deepcopy(blocks)).double(), x.double())
    stored = gradients(nn.Sequential(*blocks), x)

    rebuilt = benchmark.pedantic(gradients, args=(ReversibleSequential(*blocks), x))

    errors = {
        method: {
            "all gradients": relative_error(flat(got), flat(truth)),
            "worst tensor": max(map(relative_error, got, truth)),
        }
        for method, got in (("store", stored), ("rebuild", rebuilt))
    }
    for of in ("all gradients", "worst tensor"):
        for method in errors:
            benchmark.extra_info[f"{of}, {method}"] = errors[method][of]
        ratio = errors["rebuild"][of] / errors["store"][of]
        benchmark.extra_info[f"{of}, rebuild / store"] = ratio


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
