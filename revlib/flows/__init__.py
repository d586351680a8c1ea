"""Normalizing flows whose activation memory does not grow with depth."""

from revlib.finite import NonFiniteError
from revlib.flows.actnorm import ActNorm
from revlib.flows.adapters import from_freia, from_nflows, from_normflows
from revlib.flows.base import StandardNormal
from revlib.flows.builders import glow, nice, realnvp, spline_flow
from revlib.flows.channel_map import ActNormConv1x1, InvertibleConv1x1
from revlib.flows.conditioners import MLP, GlowConvNet, ResidualConvNet
from revlib.flows.couplings import (
    AdditiveCoupling,
    AffineCoupling,
    MultiplicativeCoupling,
    SplineCoupling,
)
from revlib.flows.distribution import FlowDistribution
from revlib.flows.flow import Flow
from revlib.flows.inverse import Inverse
from revlib.flows.layer import FlowLayer
from revlib.flows.preprocessing import Affine, Dequantize, Logit
from revlib.flows.rearranging import Flatten, Permutation, Squeeze, Unsqueeze
from revlib.flows.scaling import DiagonalScaling
from revlib.flows.sequential import FlowSequential
from revlib.flows.split import Split

__all__ = [
    "MLP",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Dequantize",
    "DiagonalScaling",
    "Flatten",
    "Flow",
    "FlowDistribution",
    "FlowLayer",
    "FlowSequential",
    "GlowConvNet",
    "Inverse",
    "InvertibleConv1x1",
    "Logit",
    "MultiplicativeCoupling",
    "NonFiniteError",
    "Permutation",
    "ResidualConvNet",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "StandardNormal",
    "Unsqueeze",
    "from_freia",
    "from_nflows",
    "from_normflows",
    "glow",
    "nice",
    "realnvp",
    "spline_flow",
]
