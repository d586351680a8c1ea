"""Runs flows of normflows, whose forward direction is from latent to data."""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from revlib.flows.adapters.couplings import FusedCoupling, channels, is_plain, make_formula
from revlib.flows.adapters.layers import Called, on_copy
from revlib.flows.adapters.nflows import make_coupling
from revlib.flows.couplings import AdditiveCoupling, AffineCoupling
from revlib.flows.layer import FlowLayer
from revlib.flows.sequential import FlowSequential
from revlib.flows.split import Split
from revlib.replay import is_altered

# Flows that go back by iterating, or not to where they came from, or that saturate; and base
# classes of such flows.
NO_CHEAP_INVERSE = {
    "Autoregressive",
    "AutoregressiveRationalQuadraticSpline",
    "CircularAutoregressiveRationalQuadraticSpline",
    "HamiltonianMonteCarlo",
    "MetropolisHastings",
    "Logit",
    "PeriodicShift",
    "PeriodicWrap",
    "Planar",
    "Residual",
}

# What scale maps make of what a sub-network gives. None has the floor of our "sigmoid".
LOG_SCALES = {
    "exp": lambda raw: raw,
    "sigmoid": lambda raw: -logsigmoid(raw + 2),
    "sigmoid_inv": lambda raw: logsigmoid(raw + 2),
}


def from_normflows(module: nn.Module | Sequence[nn.Module]) -> FlowSequential:
    """Makes a chain of flows of normflows, from data to latent.

    That is the other way round than in normflows: the chain's `forward` is what normflows calls
    `inverse`. The chain holds the user's own modules: training one trains the other. The
    sub-networks of couplings are evaluated twice in a step that rebuilds, other flows three
    times, and flows without a cheap inverse are stored.

    Args:
        module: A `NormalizingFlow`, `ConditionalNormalizingFlow`, `ClassCondFlow` or
            `MultiscaleFlow`, whose flows are taken without the base distribution; or one flow; or
            flows in a list, from latent to data as in normflows.

    Raises:
        TypeError: If something is no flow of normflows that goes from one tensor to one tensor.

    Shape:
        That of the flows. A context reaches the flows that take one. The latent of a
        `MultiscaleFlow` is a tuple, of which the last was `z[0]` in normflows.

    References:
        normflows: A PyTorch Package for Normalizing Flows (Stimper et al., 2023),
        https://arxiv.org/abs/2302.12014

    Example:
        >>> from normflows.flows import LULinearPermute
        >>> chain = revlib.flows.from_normflows([LULinearPermute(4), LULinearPermute(4)])
        >>> z, log_det = chain(torch.randn(3, 4))
        >>> len(chain), z.shape, log_det.shape
        (2, torch.Size([3, 4]), torch.Size([3]))
    """
    import normflows

    models = normflows.NormalizingFlow, normflows.ClassCondFlow
    if isinstance(module, normflows.MultiscaleFlow):
        return FlowSequential(*multiscale_layers(module))
    flows = module.flows if isinstance(module, models) else module
    return FlowSequential(*layers(flows))


def multiscale_layers(module: nn.Module) -> Iterator[FlowLayer]:
    if module.transform is not None:
        yield from layers(module.transform)
    for level in reversed(range(len(module.flows))):
        yield from layers(module.flows[level])
        if level:
            mode = module.merges[level - 1].mode
            if mode != "channel":
                raise ValueError(f"merges must have the mode 'channel'; got {mode!r}")
            yield Split()


def layers(module: object, *, flip: bool = True) -> Iterator[FlowLayer]:
    """Yields the layers of a flow or of several: from data to latent, or not if not `flip`."""
    import normflows
    from normflows import flows
    from normflows.flows.neural_spline.coupling import Coupling as SplineCoupling

    if isinstance(module, list | tuple | nn.ModuleList):
        for part in reversed(module) if flip else module:
            yield from layers(part, flip=flip)
        return
    on_pairs = flows.AffineCoupling, flows.Split, flows.Merge
    if not isinstance(module, flows.Flow) or type(module) in on_pairs:
        raise TypeError(
            "module must be a NormalizingFlow, ConditionalNormalizingFlow, ClassCondFlow or "
            "MultiscaleFlow of normflows, or flows from one tensor to one tensor, such as "
            f"AffineCouplingBlock; got {type(module).__name__}"
        )
    kind = None if is_altered(module) else type(module)
    if kind is flows.Composite:
        yield from layers(module._flows, flip=flip)
    elif kind is flows.GlowBlock:
        yield from layers(module.flows, flip=flip)
    elif kind is flows.Reverse:
        yield from layers(module.flow, flip=not flip)
    elif has_our_formula(module):
        yield make_fused(module, flip=flip)
    elif kind in (
        flows.CoupledRationalQuadraticSpline,
        flows.CircularCoupledRationalQuadraticSpline,
    ):
        yield make_coupling(module.prqct, flip=not flip)
    elif kind is not None and kind.forward is SplineCoupling.forward:
        yield make_coupling(module, flip=flip)
    else:
        takes_context = len(inspect.signature(type(module).forward).parameters) > 2
        runner = run_with_context if takes_context else run
        yield Called(
            module,
            partial(on_copy, run) if isinstance(module, normflows.transforms.Shift) else runner,
            flip=flip,
            cheap_inverse=has_cheap_inverse(module),
        )


def has_cheap_inverse(module: nn.Module) -> bool:
    from normflows.flows import Flow

    names = {cls.__name__ for cls in type(module).__mro__}
    return type(module).inverse is not Flow.inverse and names.isdisjoint(NO_CHEAP_INVERSE)


def has_our_formula(module: nn.Module) -> bool:
    """Tells whether a flow is an affine coupling that computes what ours do."""
    if is_plain(module, "MaskedAffineFlow"):
        return bool(((module.b == 0) | (module.b == 1)).all())
    if not is_plain(module, "AffineCouplingBlock"):
        return False
    _, coupling, _ = module.flows
    plain = map(is_plain, module.flows, ("Split", "AffineCoupling", "Merge"))
    return all(plain) and (not coupling.scale or coupling.scale_map in LOG_SCALES)


def make_fused(module: nn.Module, *, flip: bool) -> FusedCoupling:
    if type(module).__name__ == "MaskedAffineFlow":
        formula = make_formula(AffineCoupling, scale="exp")
        networks = [name for name in ("s", "t") if name in module._modules]
        where = partial(channels, slice(None))
        return FusedCoupling(module, networks, ask_masked, where, formula, flip=flip)
    split, coupling, _ = module.flows
    kind, options = (
        (AffineCoupling, {"scale": "exp"}) if coupling.scale else (AdditiveCoupling, {})
    )
    # The flip tells exact arithmetic which elements change.
    formula = make_formula(kind, flip=split.mode == "channel_inv", **options)
    ask, where = partial(ask_first, split), partial(second, split)
    return FusedCoupling(coupling, ["param_map"], ask, where, formula, flip=flip)


def ask_first(split: nn.Module, module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Asks about the half that is kept."""
    (x1, _), _ = split(x)
    h = module.param_map(x1)
    if not module.scale:
        return h
    shift, raw = h[:, 0::2], h[:, 1::2]
    return torch.cat((LOG_SCALES[module.scale_map](raw), shift), 1)


def ask_masked(module: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Asks about what is kept; the rest, multiplied by 1 and shifted by 0, stays as it is."""
    kept = module.b * x
    return torch.cat([(1 - module.b) * f(kept) for f in (module.s, module.t)], 1)


def second(split: nn.Module, module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Tells where the second of the two halves is into which normflows splits a stream."""
    if "checkerboard" not in split.mode:
        half = (x.shape[1] + 1) // 2
        return slice(None), slice(half) if "inv" in split.mode else slice(half, None)
    # Every other element of the last dimension, from the first or the second, as the sum of the
    # other indices is even or odd.
    others = [
        torch.arange(n, device=x.device).view(-1, *(1,) * (x.ndim - 1 - dim))
        for dim, n in enumerate(x.shape[1:-1], 1)
    ]
    start = (sum(others) + ("inv" in split.mode)) % 2
    return slice(None), *others, torch.arange(0, x.shape[-1], 2, device=x.device) + start


def run(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return module.inverse(x) if inverse else module(x)


def run_with_context(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    args = (x,) if context is None else (x, context)
    return module.inverse(*args) if inverse else module(*args)
