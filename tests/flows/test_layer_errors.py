"""One clear error for each bad argument or input: the argument, the rule, and what was given."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.utils import parametrize

import revlib
from revlib import flows


class Bad(NamedTuple):
    """A call that must raise, the error's type, and a part of its text."""

    call: Callable[[], Any]
    error: type[Exception]
    text: str


def net(c_in: int, c_out: int) -> nn.Module:
    return nn.Linear(c_in, c_out)


class Twice(nn.Module):
    """A conditioner that returns a pair."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Rounded(nn.Module):
    """A conditioner that returns whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class WithoutLogDet(flows.FlowLayer):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x


class SumLogDet(flows.FlowLayer):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.sum()


class Undefined(flows.FlowLayer):
    pass


class WrongInverse(flows.FlowLayer):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))


class Uniform01(nn.Module):
    """A base of the user's own, which knows no temperature."""

    def log_prob(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z))

    def sample(self, n: int) -> Tensor:
        return torch.rand(n, 2)


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


def whole(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def normal(size: int) -> Independent:
    return Independent(Normal(torch.zeros(size), 1.0), 1)


def multiscale() -> flows.FlowSequential:
    """Takes [batch, 1, 4, 4]; its latents are [batch, 2, 2, 2] twice."""
    return flows.FlowSequential(flows.Squeeze(), flows.Split())


def vector_flow(context: int = 0) -> flows.Flow:
    return flows.realnvp((2,), layers=2, hidden=4, context=context)


ARGUMENTS = {
    # Couplings
    "mask": Bad(
        lambda: flows.AdditiveCoupling(net(2, 2), mask="rows"),
        ValueError,
        "mask must be one of channel, checkerboard; got 'rows'",
    ),
    "flip": Bad(
        lambda: flows.AffineCoupling(net(2, 4), flip=1),
        TypeError,
        "flip must be True or False; got 1",
    ),
    "conditioner-function": Bad(
        lambda: flows.SplineCoupling(lambda x: x),
        TypeError,
        "conditioner must be a module; got function",
    ),
    "scale": Bad(
        lambda: flows.AffineCoupling(net(2, 4), scale="relu"),
        ValueError,
        "AffineCoupling: scale must be one of tanh, exp, sigmoid, atan; got 'relu'",
    ),
    "clamp-zero": Bad(
        lambda: flows.AffineCoupling(net(2, 4), clamp=0),
        ValueError,
        "AffineCoupling: clamp must be finite and positive; got 0",
    ),
    "clamp-nan": Bad(
        lambda: flows.MultiplicativeCoupling(net(2, 2), clamp=math.nan),
        ValueError,
        "clamp must be finite and positive; got nan",
    ),
    "clamp-text": Bad(
        lambda: flows.AffineCoupling(net(2, 4), clamp="2"),
        TypeError,
        "clamp must be a number; got '2'",
    ),
    "interleaved": Bad(
        lambda: flows.AffineCoupling(net(2, 4), interleaved="yes"),
        TypeError,
        "AffineCoupling: interleaved must be True or False; got 'yes'",
    ),
    "bins-few": Bad(
        lambda: flows.SplineCoupling(net(2, 4), bins=1),
        ValueError,
        "SplineCoupling: bins must be from 2 to 32; got 1",
    ),
    "bins-many": Bad(
        lambda: flows.SplineCoupling(net(2, 4), bins=33),
        ValueError,
        "SplineCoupling: bins must be from 2 to 32; got 33",
    ),
    "bins-fraction": Bad(
        lambda: flows.SplineCoupling(net(2, 4), bins=2.5),
        TypeError,
        "SplineCoupling: bins must be an integer; got 2.5",
    ),
    "bound": Bad(
        lambda: flows.SplineCoupling(net(2, 4), bound=-1),
        ValueError,
        "SplineCoupling: bound must be finite and positive; got -1",
    ),
    "min_width": Bad(
        lambda: flows.SplineCoupling(net(2, 4), min_width=0.5),
        ValueError,
        "min_width must leave room for 8 bins, min_width * bins < 1; got 0.5",
    ),
    "min_height": Bad(
        lambda: flows.SplineCoupling(net(2, 4), min_height=-0.5),
        ValueError,
        "min_height must be finite and positive; got -0.5",
    ),
    "min_slope": Bad(
        lambda: flows.SplineCoupling(net(2, 4), min_slope=0),
        ValueError,
        "min_slope must be finite and positive; got 0",
    ),
    # Linear layers
    "scaling-empty": Bad(
        lambda: flows.DiagonalScaling(()), ValueError, "shape must be that of a sample"
    ),
    "scaling-negative": Bad(
        lambda: flows.DiagonalScaling((3, -1)), ValueError, "shape must be that of a sample"
    ),
    "actnorm-zero": Bad(
        lambda: flows.ActNorm(0), ValueError, "ActNorm: channels must be from 1 to"
    ),
    "actnorm-fraction": Bad(
        lambda: flows.ActNorm(2.5), TypeError, "ActNorm: channels must be an integer; got 2.5"
    ),
    "conv-zero": Bad(
        lambda: flows.InvertibleConv1x1(0), ValueError, "channels must be from 1 to 2147483648"
    ),
    "actnorm-conv": Bad(
        lambda: flows.ActNormConv1x1(-2), ValueError, "channels must be from 1 to 2147483648"
    ),
    # Rearranging and splitting
    "indices-twice": Bad(
        lambda: flows.Permutation([0, 0, 1]),
        ValueError,
        "indices must hold every number from 0 to channels - 1 once; got [0, 0, 1]",
    ),
    "indices-floating": Bad(
        lambda: flows.Permutation([0.0, 1.0]), ValueError, "indices must hold every number"
    ),
    "indices-matrix": Bad(
        lambda: flows.Permutation([[0, 1], [2, 3]]), ValueError, "indices must hold every number"
    ),
    "indices-none": Bad(
        lambda: flows.Permutation([]), ValueError, "indices must hold every number"
    ),
    "squeeze-factor": Bad(
        lambda: flows.Squeeze(1), ValueError, "Squeeze: factor must be from 2 to 32768; got 1"
    ),
    "unsqueeze-factor": Bad(
        lambda: flows.Unsqueeze(2.5), TypeError, "Unsqueeze: factor must be an integer; got 2.5"
    ),
    "split-conditioner": Bad(
        lambda: flows.Split("net"), TypeError, "conditioner must be a module; got str"
    ),
    "split-scale": Bad(
        lambda: flows.Split(scale="relu"), ValueError, "Split: scale must be one of tanh, exp,"
    ),
    "split-clamp": Bad(
        lambda: flows.Split(clamp=-1), ValueError, "Split: clamp must be finite and positive"
    ),
    # Preprocessing
    "levels-one": Bad(
        lambda: flows.Dequantize(1), ValueError, "Dequantize: levels must be from 2 to 4096; got 1"
    ),
    "levels-many": Bad(
        lambda: flows.Dequantize(2**16), ValueError, "Dequantize: levels must be from 2 to 4096"
    ),
    "levels-fraction": Bad(
        lambda: flows.Dequantize(2.5), TypeError, "Dequantize: levels must be an integer; got 2.5"
    ),
    "alpha-half": Bad(
        lambda: flows.Logit(0.5), ValueError, "alpha must be from 0 up and below 0.5; got 0.5"
    ),
    "alpha-nan": Bad(
        lambda: flows.Logit(math.nan), ValueError, "alpha must be from 0 up and below 0.5; got nan"
    ),
    "std-zero": Bad(
        lambda: flows.Affine(0, 0), ValueError, "std must be above 0 and finite; got 0.0"
    ),
    "std-nan": Bad(
        lambda: flows.Affine(0, math.nan), ValueError, "std must be above 0 and finite; got nan"
    ),
    # Chains and flows
    "inverse-of-a-network": Bad(
        lambda: flows.Inverse(net(2, 2)), TypeError, "layer must be a FlowLayer; got Linear"
    ),
    "inverse-of-a-split": Bad(
        lambda: flows.Inverse(multiscale()), ValueError, "layer must not factor out latents"
    ),
    "chain-of-a-network": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(2), net(2, 2)),
        TypeError,
        "block 1 (Linear) has no log_det; derive it from revlib.flows.FlowLayer",
    ),
    "chain-of-a-revnet-block": Bad(
        lambda: flows.FlowSequential(revlib.AdditiveCoupling(net(2, 2), net(2, 2))),
        TypeError,
        "block 0 (AdditiveCoupling) has no log_det",
    ),
    "plain-chain-of-a-layer": Bad(
        lambda: revlib.ReversibleSequential(flows.ActNorm(2)),
        TypeError,
        "block 0 (ActNorm) returns a log_det, too; put it in a FlowSequential",
    ),
    "policy": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(2), policy="keep"),
        ValueError,
        "policy must be one of 'rebuild', 'store', 'recompute'; got 'keep' for block 0 (ActNorm)",
    ),
    "policies": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(2), policy=["store"] * 2),
        ValueError,
        "policy must have one entry per block; got 2 for 1 blocks",
    ),
    "transform": Bad(
        lambda: flows.Flow(net(2, 2)), TypeError, "transform must be a FlowLayer; got Linear"
    ),
    "base-with-a-batch": Bad(
        lambda: flows.Flow(flows.ActNorm(2), Normal(torch.zeros(2), 1.0)),
        ValueError,
        "base must be one distribution over the latent of a sample, with an empty batch_shape; "
        "got (2,); see torch.distributions.Independent",
    ),
    # Conditioners
    "c_in": Bad(lambda: flows.MLP(0, 2), ValueError, "MLP: c_in must be from 1 to"),
    "hidden": Bad(
        lambda: flows.MLP(2, 2, hidden=3), TypeError, "hidden must be a sequence of widths; got 3"
    ),
    "hidden-of-glow": Bad(
        lambda: flows.GlowConvNet(2, 2, hidden=0), ValueError, "GlowConvNet: hidden must be from 1"
    ),
    "blocks": Bad(
        lambda: flows.ResidualConvNet(2, 2, blocks=1.5),
        TypeError,
        "ResidualConvNet: blocks must be an integer; got 1.5",
    ),
    # Builders
    "shape-integer": Bad(
        lambda: flows.nice(3),
        ValueError,
        "nice: shape must be (channels, height, width) or (features,); got 3",
    ),
    "shape-of-truth": Bad(
        lambda: flows.nice((True, 4, 4)), ValueError, "nice: shape must be (channels, height,"
    ),
    "shape-matrix": Bad(
        lambda: flows.realnvp((3, 3)), ValueError, "realnvp: shape must be (channels, height,"
    ),
    "shape-zero": Bad(
        lambda: flows.spline_flow((0,)), ValueError, "spline_flow: shape must be (channels,"
    ),
    "shape-single": Bad(
        lambda: flows.glow((1,)),
        ValueError,
        "glow: shape must leave something to couple; got (1,)",
    ),
    "shape-one-pixel": Bad(
        lambda: flows.nice((1, 1, 1)),
        ValueError,
        "nice: shape must leave something to couple; got (1, 1, 1)",
    ),
    "nice-layers": Bad(
        lambda: flows.nice((4,), layers=0),
        ValueError,
        "nice: layers must be a whole number above 0; got 0",
    ),
    "glow-steps": Bad(
        lambda: flows.glow((4,), steps=True),
        ValueError,
        "glow: steps must be a whole number above 0; got True",
    ),
    "glow-levels": Bad(
        lambda: flows.glow((3, 6, 6), levels=2),
        ValueError,
        "glow: height and width must be divisible by 4, to be squeezed 2 times; got 6x6; "
        "use fewer levels, or pad the images",
    ),
    "realnvp-levels": Bad(
        lambda: flows.realnvp((3, 5, 4)),
        ValueError,
        "realnvp: height and width must be divisible by 2",
    ),
    "glow-levels-of-vectors": Bad(
        lambda: flows.glow((4,), levels=2),
        ValueError,
        "glow: levels must be 1 for vectors; got 2",
    ),
    "glow-dequantize": Bad(
        lambda: flows.glow((4,), dequantize=1), ValueError, "levels must be from 2 to 4096; got 1"
    ),
    "spline-bins": Bad(
        lambda: flows.spline_flow((4,), bins=1), ValueError, "bins must be from 2 to 32; got 1"
    ),
    "glow-context": Bad(
        lambda: flows.glow((4,), context=-1), ValueError, "must be from 0 to 2147483648; got -1"
    ),
    "builder-policy": Bad(
        lambda: flows.nice((4,), policy="keep"), ValueError, "policy must be one of 'rebuild',"
    ),
    "subnet": Bad(
        lambda: flows.nice((4,), subnet_constructor=lambda c_in, c_out: None),
        TypeError,
        "conditioner must be a module; got NoneType",
    ),
    "lu": Bad(
        lambda: flows.InvertibleConv1x1(2, lu="yes"), TypeError, "lu must be True or False; got"
    ),
    "scaling-fraction": Bad(
        lambda: flows.DiagonalScaling(2.5), ValueError, "shape must be that of a sample"
    ),
    "indices-of-truth": Bad(
        lambda: flows.Permutation([False, True]), ValueError, "indices must hold every number"
    ),
    "indices-text": Bad(
        lambda: flows.Permutation("ab"), ValueError, "indices must hold every number"
    ),
    "reverse-none": Bad(
        lambda: flows.Permutation.reverse(0), ValueError, "channels must be from 1"
    ),
    "reverse-negative": Bad(
        lambda: flows.Permutation.reverse(-1), ValueError, "channels must be from 1"
    ),
    "random-fraction": Bad(
        lambda: flows.Permutation.random(2.5), TypeError, "channels must be an integer; got 2.5"
    ),
    "flatten-integer": Bad(lambda: flows.Flatten(3), ValueError, "shape must be that of a sample"),
    "flatten-negative": Bad(
        lambda: flows.Flatten((-1, 3)), ValueError, "shape must be that of a sample"
    ),
    "alpha-text": Bad(lambda: flows.Logit("a"), TypeError, "alpha must be a number; got 'a'"),
    "std-infinite": Bad(
        lambda: flows.Affine(0, math.inf), ValueError, "std must be above 0 and finite; got inf"
    ),
    "mean-nan": Bad(lambda: flows.Affine(math.nan), ValueError, "mean must be finite; got nan"),
    "base": Bad(
        lambda: flows.Flow(flows.ActNorm(2), 3),
        TypeError,
        "base must be a torch Distribution or a module with log_prob and sample; got int",
    ),
    "flow-shape": Bad(
        lambda: flows.Flow(flows.ActNorm(2), shape=2), ValueError, "shape must be that of a sample"
    ),
    "normal-shape": Bad(
        lambda: flows.StandardNormal(2),
        ValueError,
        "StandardNormal: shape must be that of a sample",
    ),
    "glow-levels-zero": Bad(
        lambda: flows.glow((3, 8, 8), levels=0, steps=1, hidden=4),
        ValueError,
        "glow: levels must be a whole number above 0; got 0",
    ),
    "realnvp-levels-of-vectors": Bad(
        lambda: flows.realnvp((4,), levels=3), ValueError, "levels must be 1 for vectors; got 3"
    ),
    "spline-bins-text": Bad(
        lambda: flows.spline_flow((4,), bins="8"),
        ValueError,
        "bins must be a whole number above 0; got '8'",
    ),
    "realnvp-layers-of-images": Bad(
        lambda: flows.realnvp((3, 8, 8), layers=4),
        ValueError,
        "realnvp: layers is for vectors; images have levels; got layers=4",
    ),
    "realnvp-blocks-of-vectors": Bad(
        lambda: flows.realnvp((4,), blocks=2),
        ValueError,
        "realnvp: blocks is for images; got blocks=2",
    ),
    "nice-hidden-of-a-subnet": Bad(
        lambda: flows.nice((4,), hidden=8, subnet_constructor=net),
        ValueError,
        "nice: hidden is for the default conditioners, not for those of a subnet_constructor; "
        "got hidden=8",
    ),
    "nice-depth-of-a-subnet": Bad(
        lambda: flows.nice((4,), depth=2, subnet_constructor=net),
        ValueError,
        "nice: depth is for the default conditioners",
    ),
    "nice-context-of-a-subnet": Bad(
        lambda: flows.nice((4,), context=3, subnet_constructor=net),
        ValueError,
        "nice: context is for the default conditioners",
    ),
    "realnvp-hidden-of-a-subnet": Bad(
        lambda: flows.realnvp((4,), hidden=8, subnet_constructor=net),
        ValueError,
        "realnvp: hidden is for the default conditioners",
    ),
    "realnvp-blocks-of-a-subnet": Bad(
        lambda: flows.realnvp((3, 8, 8), blocks=2, subnet_constructor=net),
        ValueError,
        "realnvp: blocks is for the default conditioners",
    ),
    "realnvp-context-of-a-subnet": Bad(
        lambda: flows.realnvp((4,), context=3, subnet_constructor=net),
        ValueError,
        "realnvp: context is for the default conditioners",
    ),
    "glow-hidden-of-a-subnet": Bad(
        lambda: flows.glow((4,), hidden=8, subnet_constructor=net),
        ValueError,
        "glow: hidden is for the default conditioners",
    ),
    "glow-context-of-a-subnet-for-vectors": Bad(
        lambda: flows.glow((4,), context=3, subnet_constructor=net),
        ValueError,
        "glow: context is for the default conditioners",
    ),
    "glow-context-of-a-subnet-without-priors": Bad(
        lambda: flows.glow((3, 8, 8), levels=1, context=3, subnet_constructor=net),
        ValueError,
        "glow: context is for the default conditioners",
    ),
    "spline-hidden-of-a-subnet": Bad(
        lambda: flows.spline_flow((4,), hidden=8, subnet_constructor=net),
        ValueError,
        "spline_flow: hidden is for the default conditioners",
    ),
    "hidden-zero": Bad(
        lambda: flows.spline_flow((4,), hidden=0),
        ValueError,
        "spline_flow: hidden must be a whole number above 0; got 0",
    ),
    "depth-zero": Bad(
        lambda: flows.nice((4,), depth=0),
        ValueError,
        "nice: depth must be a whole number above 0; got 0",
    ),
    "subnet-constructor": Bad(
        lambda: flows.nice((4,), subnet_constructor=3),
        TypeError,
        "subnet_constructor must be a function of two numbers, which builds the conditioner of "
        "each coupling; got int",
    ),
    "subnet-constructor-built": Bad(
        lambda: flows.glow((4,), subnet_constructor=net(2, 4)),
        TypeError,
        "subnet_constructor must be a function of two numbers, which builds the conditioner of "
        "each coupling; got Linear",
    ),
}

INPUTS = {
    # What conditioners return
    "affine-conditioner": Bad(
        lambda: flows.AffineCoupling(net(3, 3))(x(5, 6)),
        ValueError,
        "AffineCoupling: conditioner must return [5, 6], 2 for each of 3 transformed channels; "
        "got [5, 3]",
    ),
    "checkerboard-conditioner": Bad(
        lambda: flows.AffineCoupling(net(6, 6), mask="checkerboard")(x(5, 6)),
        ValueError,
        "AffineCoupling: conditioner must return [5, 12]",
    ),
    "additive-conditioner-that-would-broadcast": Bad(
        lambda: flows.AdditiveCoupling(net(3, 1))(x(5, 6)),
        ValueError,
        "AdditiveCoupling: conditioner must return [5, 3]",
    ),
    "multiplicative-conditioner": Bad(
        lambda: flows.MultiplicativeCoupling(net(3, 6))(x(5, 6)),
        ValueError,
        "MultiplicativeCoupling: conditioner must return [5, 3]",
    ),
    "spline-conditioner": Bad(
        lambda: flows.SplineCoupling(net(3, 6))(x(5, 6)),
        ValueError,
        "SplineCoupling: conditioner must return [5, 69], 23 for each of 3 transformed channels",
    ),
    "split-conditioner": Bad(
        lambda: flows.Split(net(3, 3))(x(5, 6)),
        ValueError,
        "Split: conditioner must return [5, 6], log std and mean of 3 channels; got [5, 3]",
    ),
    "conditioner-in-a-chain": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(6), flows.AffineCoupling(net(3, 3)))(x(5, 6)),
        ValueError,
        "block 1 (AffineCoupling): conditioner must return [5, 6]",
    ),
    "conditioner-of-a-pair": Bad(
        lambda: flows.FlowSequential(flows.AdditiveCoupling(Twice()))(x(5, 6).requires_grad_()),
        TypeError,
        "block 0 (AdditiveCoupling): conditioner must return a tensor; got tuple",
    ),
    "conditioner-of-a-builder": Bad(
        lambda: flows.nice((4,), subnet_constructor=lambda i, o: net(i, o + 1)).nll(x(5, 4)),
        ValueError,
        "(AdditiveCoupling): conditioner must return [5, 2]",
    ),
    # Streams
    "whole-numbers-in-a-layer": Bad(
        lambda: flows.ActNorm(6)(whole(5, 6)),
        TypeError,
        "ActNorm: x must be floating point; got torch.int64",
    ),
    "whole-numbers-in-a-coupling": Bad(
        lambda: flows.AffineCoupling(net(3, 6))(whole(5, 6)),
        TypeError,
        "AffineCoupling: x must be floating point; got torch.int64",
    ),
    "complex-in-a-layer": Bad(
        lambda: flows.ActNorm(6).inverse(torch.ones(5, 6, dtype=torch.complex64)),
        TypeError,
        "ActNorm: x must be floating point; got torch.complex64",
    ),
    "whole-numbers-in-a-chain": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(6))(whole(5, 6)),
        TypeError,
        "the chain takes floating-point tensors; got torch.int64",
    ),
    "whole-numbers-in-a-chain-of-dequantize": Bad(
        lambda: flows.FlowSequential(flows.Dequantize())(whole(5, 6)),
        TypeError,
        "the chain takes floating-point tensors; got torch.int64",
    ),
    "list-in-a-layer": Bad(
        lambda: flows.ActNorm(2)([1.0, 2.0]), TypeError, "x must be a tensor or a pair of tensors"
    ),
    "list-in-a-chain": Bad(
        lambda: multiscale()([1.0]),
        TypeError,
        "the chain takes one tensor in this direction; got a list",
    ),
    "coupling-without-batch": Bad(
        lambda: flows.AffineCoupling(net(3, 6))(x(6)),
        ValueError,
        "must name a dimension of size 2 or more; got input of shape (6,)",
    ),
    "coupling-of-one-channel": Bad(
        lambda: flows.AffineCoupling(net(1, 2))(x(5, 1)),
        ValueError,
        "must name a dimension of size 2 or more; got input of shape (5, 1)",
    ),
    "split-of-one-channel": Bad(
        lambda: flows.Split()(x(5, 1)), ValueError, "must name a dimension of size 2 or more"
    ),
    "scaling-shape": Bad(
        lambda: flows.DiagonalScaling((4,))(x(5, 6)),
        ValueError,
        "DiagonalScaling: samples must have the shape [4]; got [6]",
    ),
    "actnorm-channels": Bad(
        lambda: flows.ActNorm(4)(x(5, 6)),
        ValueError,
        "ActNorm: the stream must be [batch, 4, ...]; got [5, 6]",
    ),
    "actnorm-without-batch": Bad(
        lambda: flows.ActNorm(4)(x(4)), ValueError, "ActNorm: the stream must be [batch, 4, ...]"
    ),
    "conv-channels": Bad(
        lambda: flows.InvertibleConv1x1(4).inverse(x(5, 6)),
        ValueError,
        "InvertibleConv1x1: the stream must be [batch, 4, ...]; got [5, 6]",
    ),
    "actnorm-conv-channels": Bad(
        lambda: flows.ActNormConv1x1(4)(x(5, 6)),
        ValueError,
        "ActNormConv1x1: the stream must be [batch, 4, ...]; got [5, 6]",
    ),
    "permutation-channels": Bad(
        lambda: flows.Permutation([1, 0])(x(5, 6)),
        ValueError,
        "Permutation: the stream must be [batch, 2, ...]; got [5, 6]",
    ),
    "squeeze-odd": Bad(
        lambda: flows.Squeeze()(x(5, 3, 5, 4)),
        ValueError,
        "height and width of x must be divisible by factor, 2; got 5 and 4",
    ),
    "squeeze-vectors": Bad(
        lambda: flows.Squeeze()(x(5, 6)),
        ValueError,
        "x must be [batch, channels, height, width]; got [5, 6]",
    ),
    "unsqueeze-channels": Bad(
        lambda: flows.Unsqueeze()(x(5, 3, 4, 4)),
        ValueError,
        "channels of x must be divisible by factor**2, 4; got 3",
    ),
    # Latents
    "one-latent-of-two": Bad(
        lambda: multiscale().inverse(x(5, 2, 2, 2)),
        TypeError,
        "the chain takes a tuple of 2 tensors in this direction; got a Tensor",
    ),
    "three-latents-of-two": Bad(
        lambda: multiscale().inverse((x(5, 2, 2, 2),) * 3),
        TypeError,
        "the chain takes a tuple of 2 tensors in this direction; got a tuple of 3",
    ),
    "list-of-latents": Bad(
        lambda: multiscale().inverse([x(5, 2, 2, 2)] * 2),
        TypeError,
        "the chain takes a tuple of 2 tensors in this direction; got a list",
    ),
    "latents-given-forward": Bad(
        lambda: multiscale()((x(5, 2, 2, 2),) * 2),
        TypeError,
        "the chain takes one tensor in this direction; got a tuple of 2",
    ),
    "latent-channels": Bad(
        lambda: multiscale().inverse((x(5, 3, 2, 2), x(5, 2, 2, 2))),
        ValueError,
        "block 1 (Split): the latent that left must be [5, 2, 2, 2], or have a channel less; "
        "got [5, 3, 2, 2]",
    ),
    "latent-rows": Bad(
        lambda: multiscale().inverse((x(4, 2, 2, 2), x(5, 2, 2, 2))),
        ValueError,
        "block 1 (Split): the latent that left must be [5, 2, 2, 2]",
    ),
    # Layers of one's own
    "layer-without-log_det": Bad(
        lambda: flows.FlowSequential(WithoutLogDet())(x(5, 6)),
        TypeError,
        "block 0 (WithoutLogDet): a layer must return a pair (z, log_det) of tensors; got Tensor",
    ),
    "layer-with-the-sum-of-log_dets": Bad(
        lambda: flows.FlowSequential(SumLogDet())(x(5, 6)),
        ValueError,
        "block 0 (SumLogDet): log_det must be [5], one for each sample; got []",
    ),
    "layer-without-methods": Bad(
        lambda: flows.FlowSequential(Undefined())(x(5, 6)),
        NotImplementedError,
        "Undefined must define forward and inverse",
    ),
    "layer-with-a-wrong-inverse": Bad(
        lambda: flows.FlowSequential(WrongInverse())(x(5, 6).requires_grad_())[0].sum().backward(),
        RuntimeError,
        "block 0 (WrongInverse): inverse does not undo forward",
    ),
    # Context
    "context-list": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2), [1.0]),
        TypeError,
        "context must be a tensor or None; got list",
    ),
    "context-missing": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2)),
        ValueError,
        "context must be given, for context_features is 3; got None",
    ),
    "context-not-asked-for": Bad(
        lambda: vector_flow().log_prob(x(5, 2), x(5, 3)),
        ValueError,
        "context must be None, for context_features is 0; got one of shape [5, 3]",
    ),
    "context-width": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2), x(5, 2)),
        ValueError,
        "context must be [5, 3]; got [5, 2]",
    ),
    "context-rows": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2), x(4, 3)),
        ValueError,
        "context must have one row for each of 5 samples, or one for all; got 4",
    ),
    "context-scalar": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2), torch.tensor(1.0)),
        ValueError,
        "context must have one row for each of 5 samples, or one for all; got a scalar",
    ),
    "context-rows-of-samples": Bad(
        lambda: vector_flow(3).sample(5, x(4, 3)),
        ValueError,
        "context must have one row for each of 5 samples, or one for all; got 4",
    ),
    # Flows
    "sample-shape": Bad(
        lambda: vector_flow().log_prob(x(5, 3)), ValueError, "x must be [batch, 2]; got [5, 3]"
    ),
    "sample-without-batch": Bad(
        lambda: vector_flow().log_prob(x(2)), ValueError, "x must be [batch, 2]; got [2]"
    ),
    "sample-double": Bad(
        lambda: vector_flow().log_prob(x(5, 2).double()),
        TypeError,
        "x must be torch.float32, as the flow's parameters are; got torch.float64",
    ),
    "sample-single": Bad(
        lambda: vector_flow().double().log_prob(x(5, 2)),
        TypeError,
        "x must be torch.float64, as the flow's parameters are; got torch.float32",
    ),
    "sample-list": Bad(
        lambda: vector_flow().log_prob([1.0]), TypeError, "x must be a tensor; got list"
    ),
    "n-negative": Bad(
        lambda: vector_flow().sample(-1), ValueError, "n must be from 0 to 2147483648; got -1"
    ),
    "n-fraction": Bad(
        lambda: vector_flow().sample_and_log_prob(2.5),
        TypeError,
        "n must be an integer; got 2.5",
    ),
    "n-shape": Bad(
        lambda: vector_flow().sample((2,)), TypeError, "n must be an integer; got (2,)"
    ),
    "temperature-negative": Bad(
        lambda: vector_flow().sample(2, temperature=-1),
        ValueError,
        "temperature must be from 0 up and finite; got -1",
    ),
    "temperature-nan": Bad(
        lambda: vector_flow().sample(2, temperature=math.nan),
        ValueError,
        "temperature must be from 0 up and finite; got nan",
    ),
    "temperature-tensor": Bad(
        lambda: vector_flow().sample(2, temperature=torch.tensor([0.5, 0.7])),
        TypeError,
        "temperature must be a number; got tensor([0.5000, 0.7000])",
    ),
    "temperature-of-another-base": Bad(
        lambda: flows.Flow(flows.ActNorm(2), normal(2)).sample(3, temperature=0.5),
        ValueError,
        "temperature is for a standard normal base; got 0.5 with Independent",
    ),
    "temperature-of-a-base-of-the-user": Bad(
        lambda: flows.Flow(flows.ActNorm(2), Uniform01()).sample(3, temperature=0.5),
        ValueError,
        "temperature must be 1 where the base's sample takes none; got 0.5 with Uniform01",
    ),
    "samples-of-unknown-shape": Bad(
        lambda: flows.Flow(flows.ActNorm(2)).sample(3),
        RuntimeError,
        "sample needs the shapes of the latents: give the flow",
    ),
    "distribution-of-unknown-shape": Bad(
        lambda: flows.Flow(flows.ActNorm(2)).distribution(),
        RuntimeError,
        "distribution needs the shape of a sample: give the flow shape=...",
    ),
    "value-of-a-distribution": Bad(
        lambda: vector_flow().distribution().log_prob(x(3)),
        ValueError,
        "value must be [..., 2]; got [3]",
    ),
    "latents-of-another-shape": Bad(
        lambda: flows.StandardNormal((2,)).log_prob(x(5, 3)),
        ValueError,
        "latents must have the shapes ((2,),); got ((3,),)",
    ),
    "conditioner-of-whole-numbers": Bad(
        lambda: flows.AdditiveCoupling(Rounded())(x(5, 6)),
        TypeError,
        "conditioner must return floating point; got torch.int64",
    ),
    "checkerboard-without-batch": Bad(
        lambda: flows.AdditiveCoupling(net(3, 3), mask="checkerboard")(x(6)),
        ValueError,
        "AdditiveCoupling: the stream must be [batch, ...]; got [6]",
    ),
    "whole-numbers-in-logit": Bad(
        lambda: flows.Logit()(whole(5, 6)), TypeError, "x must be floating point; got torch.int64"
    ),
    "whole-numbers-in-affine": Bad(
        lambda: flows.Affine(0.5, 2.0)(whole(5, 6)), TypeError, "x must be floating point; got"
    ),
    "whole-numbers-in-dequantize": Bad(
        lambda: flows.Dequantize()(whole(5, 6)), TypeError, "x must be floating point; got"
    ),
    "logit-out-of-range": Bad(
        lambda: flows.Logit()(torch.tensor([[0.5, 1.2]])),
        ValueError,
        "Logit: x must be from 0 to 1; got 1.2",
    ),
    "logit-without-batch": Bad(
        lambda: flows.Logit()(torch.rand(6)), ValueError, "the stream must be [batch, ...]"
    ),
    "affine-shape": Bad(
        lambda: flows.Affine(torch.zeros(4))(x(5, 6)),
        ValueError,
        "mean must broadcast to a sample, [6]; got [4]",
    ),
    "flatten-shape": Bad(
        lambda: flows.Flatten((3, 2))(x(4, 3)),
        ValueError,
        "Flatten: samples must have the shape [3, 2]; got [3]",
    ),
    "flatten-features": Bad(
        lambda: flows.Flatten((3, 2)).inverse(x(4, 5)),
        ValueError,
        "Flatten: samples must have the shape [6]; got [5]",
    ),
    "split-inverse-of-one": Bad(
        lambda: flows.Split().inverse(x(5, 6)),
        TypeError,
        "Split: this direction takes a tuple of 2 tensors; got Tensor",
    ),
    "latent-of-whole-numbers": Bad(
        lambda: multiscale().inverse((whole(5, 2, 2, 2), x(5, 2, 2, 2))),
        TypeError,
        "the chain takes floating-point tensors; got torch.int64",
    ),
    "context-list-of-samples": Bad(
        lambda: vector_flow(3).sample(5, [1.0]),
        TypeError,
        "context must be a tensor or None; got list",
    ),
    "context-scalar-of-samples": Bad(
        lambda: vector_flow(3).sample(5, torch.tensor(1.0)),
        ValueError,
        "context must have one row for each of 5 samples",
    ),
    "context-of-a-distribution": Bad(
        lambda: vector_flow(3).distribution([1.0]),
        TypeError,
        "context must be a tensor or None; got list",
    ),
    "complex-samples": Bad(
        lambda: vector_flow().log_prob(torch.ones(5, 2, dtype=torch.complex64)),
        TypeError,
        "x must be floating point or whole numbers; got torch.complex64",
    ),
    "no-samples": Bad(
        lambda: vector_flow().nll(x(0, 2)), ValueError, "nll needs at least one sample"
    ),
    "context-scalar-of-a-distribution": Bad(
        lambda: vector_flow(3).distribution(torch.tensor(1.0)),
        ValueError,
        "context must be [batch, ...]; got a scalar",
    ),
    "value-list": Bad(
        lambda: vector_flow().distribution().log_prob([1.0, 2.0]),
        TypeError,
        "value must be a tensor; got list",
    ),
    "batch_shape-of-other-rows": Bad(
        lambda: vector_flow(3).distribution(x(5, 3)).expand((4,)),
        ValueError,
        "batch_shape must be one that [5] broadcasts to; got [4]",
    ),
    "batch_shape-of-fewer-dimensions": Bad(
        lambda: vector_flow().distribution().expand((2, 4)).expand((4,)),
        ValueError,
        "batch_shape must be one that [2, 4] broadcasts to; got [4]",
    ),
    "value-of-a-distribution-by-rows": Bad(
        lambda: vector_flow(3).distribution(x(4, 3)).log_prob(x(3, 2)),
        ValueError,
        "value must broadcast with the batch_shape [4]; got [3, 2]",
    ),
    "base-of-one-latent": Bad(
        lambda: flows.Flow(flows.Split(), normal(2)).log_prob(x(5, 4)),
        TypeError,
        "base must be over 2 latents",
    ),
    "base-of-another-shape": Bad(
        lambda: flows.Flow(flows.ActNorm(2), normal(3)).log_prob(x(5, 2)),
        ValueError,
        "base must be over latents of shape [2]; got [3]",
    ),
    "latents-list": Bad(
        lambda: flows.StandardNormal((2,)).log_prob([x(5, 2)]),
        TypeError,
        "must be a tensor or a tuple of tensors; got list",
    ),
}


@pytest.mark.parametrize("bad", (ARGUMENTS | INPUTS).values(), ids=ARGUMENTS | INPUTS)
def test_a_bad_argument_or_input_is_named_with_its_rule_and_value(bad: Bad):
    with pytest.raises(bad.error) as caught:
        bad.call()

    assert bad.text in str(caught.value)


class Breaks(nn.Module):
    """A conditioner that raises an error of its own, from the n-th call on."""

    def __init__(self, n: int = 1) -> None:
        super().__init__()
        self.left = n
        self.net = net(3, 6)
        self.error = KeyError("broken")

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return self.net(x)


class BrokenInverse(WrongInverse):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise KeyError("broken")


class BrokenWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        raise KeyError("broken")


def coupled(conditioner: nn.Module, **options: object) -> flows.FlowSequential:
    """Takes [batch, 6]."""
    return flows.FlowSequential(flows.ActNorm(6), flows.AffineCoupling(conditioner), **options)


def backward(chain: flows.FlowSequential) -> None:
    z, _ = chain(x(5, 6).requires_grad_())
    z.sum().backward()


def broken_convolution() -> flows.FlowSequential:
    chain = flows.FlowSequential(flows.InvertibleConv1x1(6, lu=False))
    parametrize.register_parametrization(chain[0], "weight", BrokenWeight(), unsafe=True)
    return chain


IN_AFFINE = "raised in block 1 (AffineCoupling), evaluating "
NOTED = {
    "dtype": Bad(
        lambda: coupled(nn.Sequential(net(3, 6)).double())(x(5, 6)),
        RuntimeError,
        f"{IN_AFFINE}Sequential on [5, 3] float32",
    ),
    "shape": Bad(
        lambda: coupled(net(4, 6))(x(5, 6)), RuntimeError, f"{IN_AFFINE}Linear on [5, 3] float32"
    ),
    "of-the-user": Bad(
        lambda: coupled(Breaks())(x(5, 6)), KeyError, f"{IN_AFFINE}Breaks on [5, 3] float32"
    ),
    "without-gradients": Bad(
        lambda: torch.no_grad()(coupled(Breaks()))(x(5, 6)),
        KeyError,
        f"{IN_AFFINE}Breaks on [5, 3] float32",
    ),
    "inverse": Bad(
        lambda: coupled(Breaks()).inverse(x(5, 6)),
        KeyError,
        f"{IN_AFFINE}Breaks on [5, 3] float32",
    ),
    "context": Bad(
        lambda: coupled(net(3, 6))(x(5, 6), x(5, 2)),
        TypeError,
        f"{IN_AFFINE}Linear on [5, 3] float32 and [5, 2] float32, the context, which is the last "
        "argument of every sub-network",
    ),
    "prior": Bad(
        lambda: flows.FlowSequential(flows.Split(net(4, 6)))(x(5, 6)),
        RuntimeError,
        "raised in block 0 (Split), evaluating Linear on [5, 3] float32",
    ),
    "layer-by-itself": Bad(
        lambda: flows.Split(net(4, 6))(x(5, 6)),
        RuntimeError,
        "raised in Split, evaluating Linear on [5, 3] float32",
    ),
    "revnet-block": Bad(
        lambda: revlib.ReversibleSequential(revlib.AdditiveCoupling(net(3, 3), net(4, 3)))(
            x(5, 6)
        ),
        RuntimeError,
        "raised in block 0 (AdditiveCoupling), evaluating Linear on [5, 3] float32",
    ),
    "revnet-block-by-itself": Bad(
        lambda: revlib.AdditiveCoupling(net(3, 3), net(4, 3))(x(5, 6)),
        RuntimeError,
        "raised in AdditiveCoupling, evaluating Linear on [5, 3] float32",
    ),
    "second-evaluation": Bad(
        lambda: backward(coupled(Breaks(2))), KeyError, f"{IN_AFFINE}Breaks on [5, 3] float32"
    ),
    "recomputation": Bad(
        lambda: backward(coupled(Breaks(2), policy="recompute")),
        KeyError,
        f"{IN_AFFINE}Breaks on [5, 3] float32",
    ),
    "inverse-of-the-user": Bad(
        lambda: backward(flows.FlowSequential(BrokenInverse())),
        KeyError,
        "raised in block 0 (BrokenInverse), evaluating BrokenInverse on [5, 6] float32",
    ),
    "weights": Bad(
        lambda: broken_convolution()(x(5, 6)),
        KeyError,
        "raised in block 0 (ParametrizedInvertibleConv1x1), "
        "evaluating ParametrizedInvertibleConv1x1 on its parameters",
    ),
    "chain-in-a-chain": Bad(
        lambda: flows.FlowSequential(flows.ActNorm(6), coupled(Breaks()))(x(5, 6)),
        KeyError,
        "raised in block 1.1 (AffineCoupling), evaluating Breaks on [5, 3] float32",
    ),
    "recomputed-chain-in-a-chain": Bad(
        lambda: flows.FlowSequential(coupled(Breaks()), policy="recompute")(x(5, 6)),
        KeyError,
        f"{IN_AFFINE}Breaks on [5, 3] float32, within block 0 (FlowSequential)",
    ),
}


@pytest.mark.parametrize("bad", NOTED.values(), ids=NOTED)
def test_an_error_of_a_sub_network_carries_one_note_that_names_the_layer(bad: Bad):
    with pytest.raises(bad.error) as caught:
        bad.call()

    assert caught.value.__notes__ == [bad.text]


IN_DTYPE = "must be torch.float32, as the flow's parameters are, where neither autocast nor a "
ODD_DTYPES = {
    "x": Bad(
        lambda: vector_flow().log_prob(x(5, 2).half()),
        RuntimeError,
        f"x {IN_DTYPE}conditioner casts it; got torch.float16",
    ),
    "context": Bad(
        lambda: vector_flow(3).log_prob(x(5, 2), x(5, 3).double()),
        RuntimeError,
        f"context {IN_DTYPE}conditioner casts it; got torch.float64",
    ),
    "context-of-samples": Bad(
        lambda: vector_flow(3).sample(5, x(5, 3).double()),
        RuntimeError,
        f"context {IN_DTYPE}conditioner casts it; got torch.float64",
    ),
}


@pytest.mark.parametrize("bad", ODD_DTYPES.values(), ids=ODD_DTYPES)
def test_an_error_in_a_flow_notes_which_input_has_another_dtype(bad: Bad):
    with pytest.raises(bad.error) as caught:
        bad.call()

    _, note = caught.value.__notes__
    assert note == bad.text


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("failed")


def test_a_flow_without_parameters_notes_no_dtype():
    with pytest.raises(RuntimeError) as caught:
        flows.Flow(flows.AdditiveCoupling(Fails())).log_prob(x(5, 2))

    assert len(caught.value.__notes__) == 1


class Casts(nn.Module):
    """A conditioner that takes any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(2, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat((x, context), 1).float())


def test_a_flow_whose_conditioners_cast_takes_any_dtype():
    flow = flows.Flow(flows.AffineCoupling(Casts()))

    log_prob = flow.log_prob(x(5, 2).half(), x(5, 1).double())

    assert log_prob.isfinite().all()


SHAPED = {
    "flow": lambda shape: flows.Flow(flows.ActNorm(3), shape=shape).shape,
    "builder": lambda shape: flows.glow(shape, levels=1, steps=1, hidden=4).shape,
    "base": lambda shape: flows.StandardNormal(shape).shapes[0],
}


@pytest.mark.parametrize("shape_of", SHAPED.values(), ids=SHAPED)
def test_a_shape_may_be_numbers_of_numpy(shape_of: Callable[[Any], tuple[int, ...]]):
    shape = shape_of([*numpy.array([3, 4, 4])])

    assert shape == (3, 4, 4) and {*map(type, shape)} == {int}


def test_counts_and_temperatures_may_be_numbers_of_numpy():
    count = numpy.int64(3)
    flow = flows.nice((4,), layers=count, hidden=count, depth=count)

    x, log_prob = flow.sample_and_log_prob(count)

    assert x.shape == (3, 4) and log_prob.shape == (3,)
    assert flow.sample(count, temperature=numpy.float32(0.5)).shape == (3, 4)


def test_an_error_that_is_raised_again_keeps_its_note():
    broken = Breaks()
    chain = flows.FlowSequential(coupled(broken), policy="recompute")

    for _ in range(3):
        with pytest.raises(KeyError):
            chain(x(5, 6))

    (note,) = broken.error.__notes__
    assert note == f"{IN_AFFINE}Breaks on [5, 3] float32, within block 0 (FlowSequential)"


COMPILED = """
import torch
from torch import nn
from revlib import flows

class Breaks(nn.Module):
    def forward(self, x):
        raise KeyError("lost")

layer = torch.compile(flows.AffineCoupling(Breaks()).eval(), backend="eager", fullgraph=True)
with torch.no_grad():
    layer(torch.zeros(5, 6))
"""


# In a process of its own: a compilation that failed changes when this one frees its tensors.
@pytest.mark.slow
def test_an_error_of_a_sub_network_that_is_compiled_is_no_trouble_with_its_note():
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)

    assert run.returncode == 1 and "Unsupported: Observed exception" in run.stderr


class TakesNoNotes(Exception):
    def add_note(self, note):
        raise TypeError


class RaisesWithoutNotes(nn.Module):
    def forward(self, x):
        raise TakesNoNotes


def test_an_error_that_takes_no_notes_is_still_the_one_raised():
    chain = flows.FlowSequential(flows.AdditiveCoupling(RaisesWithoutNotes()))

    with pytest.raises(TakesNoNotes):
        chain(torch.randn(5, 6))
