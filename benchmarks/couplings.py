"""The stack of couplings that the benchmarks run, and the ways to keep its activations.

f and g are GroupNorm, activation and 3x3 convolution, twice; the stream has 64 channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from revlib import AdditiveCoupling, ReversibleSequential

CHANNELS = 64


def make_blocks(
    depth: int, device: torch.device, activation: type[nn.Module] = nn.ReLU
) -> list[AdditiveCoupling]:
    def sub_network() -> nn.Sequential:
        c = CHANNELS // 2
        layers = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, c), activation(), nn.Conv2d(c, c, 3, padding=1)]
        return nn.Sequential(*layers)

    return [AdditiveCoupling(sub_network(), sub_network()).to(device) for _ in range(depth)]


def make_input(device: torch.device) -> Tensor:
    return torch.randn(16, CHANNELS, 32, 32, device=device, requires_grad=True)


class CheckpointPerBlock(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointSqrt(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self, int(len(self) ** 0.5), x, use_reentrant=False)


def rebuild_and_store(*blocks: AdditiveCoupling) -> ReversibleSequential:
    """Stores the last quarter of the blocks; that stays below checkpoint's memory."""
    stored = len(blocks) // 4
    policies = ["rebuild"] * (len(blocks) - stored) + ["store"] * stored
    return ReversibleSequential(*blocks, policy=policies)


METHODS: dict[str, Callable[..., nn.Module]] = {
    "store": nn.Sequential,
    "rebuild": ReversibleSequential,
    "rebuild, store last quarter": rebuild_and_store,
    "recompute": lambda *blocks: ReversibleSequential(*blocks, policy="recompute"),
    "checkpoint per block": CheckpointPerBlock,
    "checkpoint sqrt": CheckpointSqrt,
}


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Returns the step: forward and backward from no gradients."""

    def step() -> None:
        model.zero_grad()
        x.grad = None
        model(x).sum().backward()

    return step


def count_evaluations(step: Callable[[], object], blocks: list[AdditiveCoupling]) -> float:
    """Counts how often one step evaluates a sub-network, on average over all of them."""
    sub_networks = [f for block in blocks for f in (block.f, block.g)]
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    # On their first layers: some libraries call f.forward itself, past the hooks of f.
    hooks = [f[0].register_forward_pre_hook(add) for f in sub_networks]
    step()
    for hook in hooks:
        hook.remove()
    return count / len(sub_networks)
