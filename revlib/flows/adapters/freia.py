"""Runs modules of FrEIA."""

import math
from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from revlib.autograd import is_altered
from revlib.flows.adapters.couplings import LibraryCoupling
from revlib.flows.adapters.layers import (
    Called,
    Steps,
    on_copy,
    per_sample,
    without_autocast,
)
from revlib.flows.layer import FlowLayer, zeros
from revlib.flows.sequential import FlowSequential
from revlib.streams import Streams

# Couplings of both sides in turn, with the sub-networks of the first step and of the second.
TWO_SIDED = {
    "NICECouplingBlock": (["F"], ["G"]),
    "RNVPCouplingBlock": (["subnet_s2", "subnet_t2"], ["subnet_s1", "subnet_t1"]),
    "GLOWCouplingBlock": (["subnet2"], ["subnet1"]),
    "GINCouplingBlock": (["subnet2"], ["subnet1"]),
}

SEVERAL_TENSORS = ("Concat", "ConcatChannel", "GaussianMixtureModel", "Split", "SplitChannel")

# Modules whose inverse iterates, is only learned, or loses what the module saturates.
NO_CHEAP_INVERSE = {"InvertibleSigmoid", "IResNetLayer", "InvAutoConv2D", "InvAutoFC"}

WRITES_TO_INPUT = ("HaarDownsampling", "HaarUpsampling")


def from_freia(module: nn.Module) -> FlowSequential:
    """Makes a chain of an invertible module of FrEIA.

    The chain holds the user's own modules: training one trains the other. The sub-networks of
    coupling blocks are evaluated twice in a step that rebuilds, other modules three times, and
    modules without a cheap inverse are stored.

    Args:
        module: A `SequenceINN`, a `GraphINN` without branches, or one module of FrEIA.

    Raises:
        TypeError: If `module` is none of these.
        ValueError: If a module takes several tensors, or the modules several conditions.

    Shape:
        That of the module. The context is FrEIA's one condition.

    References:
        FrEIA, the Framework for Easily Invertible Architectures (Ardizzone et al., 2018),
        https://github.com/vislearn/FrEIA

    Example:
        >>> from FrEIA.framework import SequenceINN
        >>> from FrEIA.modules import PermuteRandom
        >>> net = SequenceINN(4)
        >>> net.append(PermuteRandom)
        >>> z, log_det = revlib.flows.from_freia(net)(torch.randn(3, 4))
        >>> z.shape, log_det.tolist()
        (torch.Size([3, 4]), [0.0, 0.0, 0.0])
    """
    return FlowSequential(*layers(module))


def layers(module: object) -> Iterator[FlowLayer]:
    """Yields the layers of a module, from data to latent."""
    from FrEIA.framework import GraphINN, SequenceINN
    from FrEIA.modules import InvertibleModule

    if not isinstance(module, InvertibleModule):
        raise TypeError(
            "module must be a SequenceINN, a GraphINN or an invertible module of FrEIA; "
            f"got {type(module).__name__}"
        )
    if isinstance(module, SequenceINN):
        check_one_condition({index for index in module.conditions if index is not None})
        for part in module:
            yield from layers(part)
    elif isinstance(module, GraphINN):
        check_one_condition(module.condition_nodes)
        if len(module.in_nodes) != 1 or len(module.out_nodes) != 1:
            raise ValueError(
                "module must be a GraphINN with one input and one output; got "
                f"{len(module.in_nodes)} and {len(module.out_nodes)}"
            )
        for part in module.module_list:
            yield from layers(part)
    else:
        yield make_layer(module)


def make_layer(module: nn.Module) -> FlowLayer:
    kind = type(module).__name__
    if kind in SEVERAL_TENSORS:
        raise ValueError(f"modules must go from one tensor to one tensor; {kind} does not")
    check_one_condition(module.dims_c)
    if type(module).__module__.startswith("FrEIA.") and not is_altered(module):
        if kind in TWO_SIDED:
            return Steps(
                module,
                [
                    LibraryCoupling(
                        module, networks, partial(see_side, side), partial(run_side, side)
                    )
                    for side, networks in enumerate(TWO_SIDED[kind])
                ],
            )
        if kind == "AffineCouplingOneSided":
            return LibraryCoupling(module, ["subnet"], partial(see_side, 1), run)
        if kind == "ConditionalAffineTransform":
            return LibraryCoupling(module, ["subnet"], see_condition, run)
        if kind == "AllInOneBlock" and not module.householder:
            coupling = LibraryCoupling(module, ["subnet"], see_first, run_affine)
            before = [Mixing(module, before=True)] if module.reverse_pre_permute else []
            return Steps(module, [*before, coupling, Mixing(module)])
    runner = partial(on_copy, run) if kind in WRITES_TO_INPUT else run
    names = {cls.__name__ for cls in type(module).__mro__}
    return Called(module, runner, cheap_inverse=names.isdisjoint(NO_CHEAP_INVERSE))


class Mixing(FlowLayer):
    """What an AllInOneBlock does to its channels before or after its coupling.

    Evaluating it must leave the block's sub-network alone, so it registers the parameters that
    are the block's own, and not the block.
    """

    def __init__(self, block: nn.Module, *, before: bool = False) -> None:
        super().__init__()
        self._parameters = block._parameters
        self._block = (block,)
        self.before = before

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.mix(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.mix(z, inverse=True)

    def mix(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        (block,) = self._block
        with without_autocast(x):
            if self.before:
                return block._pre_permute(x, rev=inverse), zeros(x)
            y, log_det = block._permute(x, rev=inverse)
        log_det = log_det * math.prod(x.shape[2:])
        return y, per_sample(-log_det if inverse else log_det, x)


def check_one_condition(conditions: Collection[object]) -> None:
    if len(conditions) > 1:
        raise ValueError(
            "modules must share one condition, which is the chain's context; "
            f"got {len(conditions)} conditions"
        )


def conditions(module: nn.Module, context: Tensor | None) -> Streams:
    """Returns the conditions that a module is to be called with."""
    if not module.dims_c:
        return ()
    if context is None:
        raise ValueError(f"{type(module).__name__} has a condition, so the chain needs a context")
    return (context,)


def see_side(side: int, module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    """Shows the half that is kept when the first half is changed, or the second."""
    x1, x2 = x.split([module.split_len1, module.split_len2], 1)
    return (torch.cat((x1 if side else x2, *conditions(module, context)), 1),)


def see_first(module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    kept, _ = x.split(module.splits, 1)
    return (torch.cat((kept, *conditions(module, context)), 1),)


def see_condition(module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    return conditions(module, context)


def run(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    found = conditions(module, context)
    (y,), log_det = module((x,), rev=inverse, **({"c": found} if found else {}))
    return y, log_det


def run_side(
    side: int, module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    x1, x2 = x.split([module.split_len1, module.split_len2], 1)
    if side:
        x2, log_det = module._coupling2(x2, x1, rev=inverse)
    else:
        x1, log_det = module._coupling1(x1, x2, rev=inverse)
    return torch.cat((x1, x2), 1), log_det


def run_affine(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    kept, x = x.split(module.splits, 1)
    y, log_det = module._affine(x, module.subnet(kept), rev=inverse)
    return torch.cat((kept, y), 1), log_det
