"""Runs transforms of nflows."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revlib.evaluate import Evaluate
from revlib.flows.adapters.couplings import (
    FusedCoupling,
    LibraryCoupling,
    has_functions,
    is_plain,
    make_formula,
)
from revlib.flows.adapters.layers import Called, Steps, stand_in
from revlib.flows.checks import check_channels
from revlib.flows.couplings import AdditiveCoupling, AffineCoupling, SplineCoupling
from revlib.flows.layer import FlowLayer
from revlib.flows.sequential import FlowSequential
from revlib.replay import in_backward, is_altered, modes_set
from revlib.streams import Streams

# What one coupling is called in nflows, and its copy in normflows.
RATIONAL_QUADRATIC = (
    "PiecewiseRationalQuadraticCouplingTransform",
    "PiecewiseRationalQuadraticCoupling",
)


def from_nflows(module: nn.Module) -> FlowSequential:
    """Makes a chain of a transform of nflows.

    The chain holds the transform's own modules: training one trains the other. The sub-networks
    of couplings are evaluated twice in a step that rebuilds, other transforms three times, and
    transforms without a cheap inverse are stored.

    Args:
        module: A transform, such as a `CompositeTransform`, or an `nflows.flows.Flow`, whose
            transform is taken.

    Raises:
        TypeError: If `module` is nothing of nflows that goes from one tensor to one tensor.
        ValueError: If it is a flow that embeds its context.

    Shape:
        That of the transform. A context reaches every transform.

    References:
        nflows: normalizing flows in PyTorch (Durkan et al., 2020),
        https://github.com/bayesiains/nflows

    Example:
        >>> from nflows.transforms import CompositeTransform, LULinear
        >>> transform = CompositeTransform([LULinear(4), LULinear(4)])
        >>> chain = revlib.flows.from_nflows(transform)
        >>> z, log_det = chain(torch.randn(3, 4))
        >>> len(chain), z.shape, log_det.shape
        (2, torch.Size([3, 4]), torch.Size([3]))
    """
    flows = sys.modules.get("nflows.flows")  # a heavy import, made by whoever has a Flow
    if flows and isinstance(module, flows.Flow):
        if not isinstance(module._embedding_net, nn.Identity):
            raise ValueError(
                "module must be a flow that does not embed its context; pass its _transform, and "
                "give the chain what its _embedding_net makes of the context; got a flow with "
                f"{type(module._embedding_net).__name__}"
            )
        module = module._transform
    return FlowSequential(*layers(module))


def layers(module: object, *, flip: bool = False) -> Iterator[FlowLayer]:
    """Yields the layers of a transform from data to latent, or of its inverse if `flip`."""
    from nflows import transforms

    if not isinstance(module, transforms.Transform) or isinstance(
        module, transforms.MultiscaleCompositeTransform
    ):
        raise TypeError(
            "module must be a Flow or a Transform of nflows, such as a CompositeTransform; a "
            "MultiscaleCompositeTransform must be put together from its parts with "
            f"revlib.flows.Split; got {type(module).__name__}"
        )
    altered = is_altered(module)
    if not altered and runs_as(module, transforms.CompositeTransform):
        for part in reversed(module._transforms) if flip else module._transforms:
            yield from layers(part, flip=flip)
    elif not altered and runs_as(module, transforms.InverseTransform):
        yield from layers(module._transform, flip=not flip)
    elif not altered and type(module).forward is transforms.AffineCouplingTransform.forward:
        yield make_coupling(module, flip=flip)
    elif isinstance(module, transforms.ActNorm):
        yield ActNorm(module, run, flip=flip)
    else:
        yield Called(module, run, flip=flip, cheap_inverse=has_cheap_inverse(module))


def runs_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Tells whether a module has both directions from a class."""
    kind = type(module)
    return kind.forward is cls.forward and kind.inverse is cls.inverse


def make_coupling(module: nn.Module, *, flip: bool = False) -> FlowLayer:
    """Returns the layer of a coupling of nflows, or of the same code in normflows.

    After the coupling may come an unconditional transform of what the coupling keeps.
    """
    if isinstance(getattr(module, "tails", None), list | tuple):
        # Such splines make 0 of all that is beyond their bound, whatever it was.
        return Called(module, run, flip=flip, cheap_inverse=False)
    if has_functions(module, "transform_net"):
        return Called(module, run, flip=flip)
    coupling = make_fused(module, flip=flip) or LibraryCoupling(
        module, ["transform_net"], see_kept, run_coupling, flip=flip
    )
    if module.unconditional_transform is None:
        return coupling
    on_kept = make_fused_on_kept(module, flip=flip) or OnKept(module, flip=flip)
    steps = [coupling, on_kept]
    return Steps(module, steps[::-1] if flip else steps)


def make_fused(module: nn.Module, *, flip: bool) -> FusedCoupling | None:
    """Returns the layer of a coupling of which we have the formula, or None for another."""
    if is_plain(module, "AdditiveCouplingTransform"):
        said, formula = ask, make_formula(AdditiveCoupling)
    elif is_plain(module, "AffineCouplingTransform") and has_default_scale(module):
        said, formula = ask_affine, make_formula(AffineCoupling, scale="sigmoid")
    elif is_plain(module, *RATIONAL_QUADRATIC):
        said, formula = ask_spline, make_spline(module, module.num_bins)
    else:
        return None
    where = partial(features, "transform_features")
    return formula and FusedCoupling(module, ["transform_net"], said, where, formula, flip=flip)


def make_fused_on_kept(module: nn.Module, *, flip: bool) -> FusedCoupling | None:
    """Returns the layer of an unconditional transform that is a spline of ours, or None."""
    name, transform = "unconditional_transform", module.unconditional_transform
    if not is_plain(transform, "PiecewiseRationalQuadraticCDF"):
        return None
    formula = make_spline(transform, transform.unnormalized_widths.shape[-1])
    where = partial(features, "identity_features")
    return formula and FusedCoupling(module, [name], ask_unconditional, where, formula, flip=flip)


def has_default_scale(module: nn.Module) -> bool:
    """Tells whether the scale is the sigmoid, which later versions of nflows let users choose."""
    default = getattr(type(module), "DEFAULT_SCALE_ACTIVATION", None)
    return getattr(module, "scale_activation", None) is default


def make_spline(module: nn.Module, bins: int) -> SplineCoupling | None:
    """Returns the spline of a module as ours, if ours has its tails and limits."""
    if module.tails != "linear":
        return None
    return make_formula(
        SplineCoupling,
        bins=bins,
        bound=module.tail_bound,
        min_width=module.min_bin_width,
        min_height=module.min_bin_height,
        min_slope=module.min_derivative,
    )


class OnKept(Called):
    """The unconditional transform of what a coupling keeps."""

    def __init__(self, coupling: nn.Module, *, flip: bool) -> None:
        super().__init__(coupling.unconditional_transform, run, flip=flip)
        self._coupling = (coupling,)  # not registered: evaluating this must leave it alone

    def call(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        kept = self._coupling[0].identity_features
        y, log_det = super().call(x[:, kept], context, inverse=inverse)
        return x.index_copy(1, kept, y), log_det


class ActNorm(Called):
    """Of which a backward pass through the inverse must not set the parameters.

    In training mode the forward direction does so at its first call.
    """

    def call(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        with modes_set([self.module], [self.module.training and not in_backward()]):
            return super().call(x, context, inverse=inverse)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        with modes_set([self.module], [self.module.training and not self.flip]):
            return super().forward_streams(streams, evaluate)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        with modes_set([self.module], [self.module.training and self.flip]):
            return super().inverse_streams(streams, evaluate)


def has_cheap_inverse(module: nn.Module) -> bool:
    from nflows import transforms
    from nflows.transforms.autoregressive import AutoregressiveTransform
    from nflows.transforms.linear import Linear

    if type(module).inverse is transforms.Transform.inverse:
        return False
    for part in module.modules():
        # What is in a cache belongs to the graph of the evaluation that put it there.
        if isinstance(part, Linear) and part.using_cache:
            return False
        # A sigmoid saturates, and its inverse does not get back what was lost.
        if isinstance(part, (AutoregressiveTransform, transforms.Sigmoid)):
            return False
    return True


def features(name: str, module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Tells where the features are of which a coupling holds the indices under this name."""
    check_channels(type(module).__name__, x, module.features)
    return slice(None), getattr(module, name)


def see_kept(module: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Any, ...]:
    return x[:, module.identity_features], context


def ask(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return module.transform_net(*see_kept(module, x, context))


def ask_affine(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    shift, raw = ask(module, x, context).chunk(2, 1)
    return torch.cat((raw, shift), 1)


def ask_spline(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Divides the logits of widths and heights by the root of the hidden size, as nflows does."""
    h, net, bins = ask(module, x, context), module.transform_net, module.num_bins
    hidden = getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))
    logits, slopes = h.unflatten(1, (-1, 3 * bins - 1)).split((2 * bins, bins - 1), 2)
    return torch.cat((logits / hidden**0.5, slopes), 2).flatten(1, 2)


def ask_unconditional(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Returns the parameters of an unconditional spline, the same for all samples."""
    spline = module.unconditional_transform
    parts = "unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives"
    h = torch.cat([getattr(spline, part) for part in parts], -1).movedim(-1, 1).flatten(0, 1)
    return h.expand(len(x), *h.shape)


def run(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return module.inverse(x, context) if inverse else module(x, context)


def run_coupling(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return run(stand_in(module, unconditional_transform=None), x, context, inverse)
