"""The stack of Glow steps that the benchmarks of flows run, and the ways to keep its activations.

A step is an activation norm, an invertible 1x1 convolution and an affine coupling of channels,
whose conditioner is three convolutions, as in Glow (Kingma and Dhariwal, 2018).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revlib import flows

CHANNELS = 12


def conditioner(
    c_in: int, c_out: int, hidden: int = 64, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Builds Glow's sub-network: convolutions of 3x3, 1x1 and 3x3, the last one zero."""
    last = nn.Conv2d(hidden, c_out, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(c_in, hidden, 3, padding=1),
        activation(),
        nn.Conv2d(hidden, hidden, 1),
        activation(),
        last,
    )


def glow_step(
    channels: int, hidden: int = 64, activation: type[nn.Module] = nn.ReLU
) -> list[flows.FlowLayer]:
    kept, changed = channels - channels // 2, channels // 2
    net = conditioner(kept, 2 * changed, hidden, activation)
    return [flows.ActNormConv1x1(channels), flows.AffineCoupling(net, scale="sigmoid")]


def glow_stack(depth: int, policy: str = "rebuild", exact: bool = False) -> flows.FlowSequential:
    layers = (layer for _ in range(depth) for layer in glow_step(CHANNELS))
    return flows.FlowSequential(*layers, policy=policy, exact=exact)


class CheckpointPerStep(nn.ModuleList):
    """Stored steps, each in `torch.utils.checkpoint`."""

    def __init__(self, depth: int) -> None:
        super().__init__(glow_stack(1, "store") for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for step in self:
            x, step_log_det = checkpoint(step, x, use_reentrant=False)
            log_det = log_det + step_log_det
        return x, log_det


METHODS: dict[str, Callable[[int], nn.Module]] = {
    "store": lambda depth: glow_stack(depth, "store"),
    "rebuild": lambda depth: glow_stack(depth, "rebuild"),
    "recompute": lambda depth: glow_stack(depth, "recompute"),
    "checkpoint per step": CheckpointPerStep,
}


def make_input(device: torch.device, batch: int = 16) -> Tensor:
    """Draws 3x32x32 images, squeezed to 12x16x16."""
    return nn.functional.pixel_unshuffle(torch.randn(batch, 3, 32, 32, device=device), 2)


def nll(z: Tensor, log_det: Tensor) -> Tensor:
    """Returns the negative log-likelihood of a standard normal latent in nats, per sample."""
    log_prob = -0.5 * (z.square() + math.log(2 * math.pi))
    return -(log_prob.flatten(1).sum(1) + log_det)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Returns the step: forward and backward from no gradients."""

    def step() -> None:
        model.zero_grad()
        nll(*model(x)).mean().backward()

    return step


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
