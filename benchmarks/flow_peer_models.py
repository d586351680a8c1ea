"""The stack of Glow steps in other libraries: modules that map x to its latent and log_det.

Each uses its library's own layers, and the conditioner of benchmarks/flow_stacks.py where the
library takes one. Where a library lacks a layer, `NOTES` says what stands in.
"""

import torch
from torch import Tensor, nn

from benchmarks.flow_stacks import CHANNELS, conditioner

HIDDEN = 64
NOTES = {
    "FrEIA": "fixed rotations",  # for learned 1x1 convolutions
    "zuko": "MLPs per pixel",  # for conditioners that are convolutions
}


class NormflowsStack(nn.Module):
    """Its Glow blocks, which go from data to latent by their inverse."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        from normflows.flows import GlowBlock

        self.blocks = nn.ModuleList(GlowBlock(CHANNELS, HIDDEN) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0
        for block in self.blocks:
            x, log_det = block.inverse(x)
            total = total + log_det
        return x, total


class WithoutContext(nn.Sequential):
    """A conditioner for nflows, which hands it a context that is None."""

    def forward(self, x: Tensor, context: None) -> Tensor:
        return super().forward(x)


def build_nflows(depth: int) -> nn.Module:
    from nflows.transforms import (
        ActNorm,
        AffineCouplingTransform,
        CompositeTransform,
        OneByOneConvolution,
    )

    def sub_network(c_in: int, c_out: int) -> nn.Module:
        return WithoutContext(*conditioner(c_in, c_out, HIDDEN))

    mask = torch.arange(CHANNELS) >= CHANNELS // 2
    return CompositeTransform(
        layer
        for _ in range(depth)
        for layer in (
            ActNorm(CHANNELS),
            OneByOneConvolution(CHANNELS),
            AffineCouplingTransform(mask, sub_network),
        )
    )


def build_freia(depth: int) -> nn.Module:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    stack = SequenceINN(CHANNELS, 16, 16)
    for _ in range(depth):
        stack.append(AllInOneBlock, subnet_constructor=conditioner, permute_soft=True)
    return stack


class ZukoStack(nn.Module):
    """Its transforms of vectors, applied to the channels of every pixel."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.lazy import LazyComposedTransform, UnconditionalTransform
        from zuko.transforms import DependentTransform, LULinearTransform, MonotonicAffineTransform

        def affine(shift: Tensor, scale: Tensor) -> DependentTransform:
            return DependentTransform(MonotonicAffineTransform(shift, scale), 1)

        mask = torch.arange(CHANNELS) < CHANNELS // 2
        self.transform = LazyComposedTransform(
            *(
                layer
                for _ in range(depth)
                for layer in (
                    UnconditionalTransform(affine, torch.zeros(CHANNELS), torch.zeros(CHANNELS)),
                    UnconditionalTransform(LULinearTransform, torch.eye(CHANNELS)),
                    GeneralCouplingTransform(
                        CHANNELS, mask=mask, hidden_features=(HIDDEN, HIDDEN)
                    ),
                )
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform().call_and_ladj(x.movedim(1, -1))
        return z.movedim(-1, 1), log_det.sum((1, 2))


BUILDERS = {
    "normflows": NormflowsStack,
    "nflows": build_nflows,
    "FrEIA": build_freia,
    "zuko": ZukoStack,
}
