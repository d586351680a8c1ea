"""Runs modules of FrEIA."""

import math
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from revlib.flows import couplings
from revlib.flows.adapters.couplings import (
    Coupling,
    FusedCoupling,
    LibraryCoupling,
    See,
    channels,
    has_functions,
    is_plain,
    make_formula,
)
from revlib.flows.adapters.layers import (
    Called,
    Run,
    Steps,
    on_copy,
    per_sample,
    without_autocast,
)
from revlib.flows.couplings import AdditiveCoupling, AffineCoupling
from revlib.flows.layer import FlowLayer, zeros
from revlib.flows.sequential import FlowSequential
from revlib.replay import is_altered
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
        yield from net_layers(module, SequenceINN)
    elif isinstance(module, GraphINN):
        check_one_condition(module.condition_nodes)
        if len(module.in_nodes) != 1 or len(module.out_nodes) != 1:
            raise ValueError(
                "module must be a GraphINN with one input and one output; got "
                f"{len(module.in_nodes)} and {len(module.out_nodes)}"
            )
        yield from net_layers(module, GraphINN)
    else:
        yield make_layer(module)


def net_layers(module: nn.Module, kind: type[nn.Module]) -> Iterator[FlowLayer]:
    """Yields the layers of the parts of a net, or one for it all if it does more than they do."""
    if type(module).forward is kind.forward and not is_altered(module):
        for part in module.module_list:
            yield from layers(part)
    else:
        yield Called(module, run_net, cheap_inverse=has_cheap_inverse(module))


def make_layer(module: nn.Module) -> FlowLayer:
    kind = type(module).__name__
    if kind in SEVERAL_TENSORS:
        raise ValueError(f"modules must go from one tensor to one tensor; {kind} does not")
    check_one_condition(module.dims_c)
    if has_functions(module, "subnet", *chain(*TWO_SIDED.get(kind, ()))):
        return Called(module, run)
    if is_plain(module, *TWO_SIDED):
        halves = slice(module.split_len1), slice(module.split_len1, None)
        sides = enumerate(zip(TWO_SIDED[kind], halves, strict=True))
        steps = [
            make_coupling(module, networks, partial(see_side, i), half, partial(run_side, i))
            for i, (networks, half) in sides
        ]
        return Steps(module, steps)
    if is_plain(module, "AffineCouplingOneSided"):
        changed = slice(module.split_len1, None)
        return make_coupling(module, ["subnet"], partial(see_side, 1), changed, run)
    if is_plain(module, "ConditionalAffineTransform"):
        return make_coupling(module, ["subnet"], see_condition, slice(None), run)
    if is_plain(module, "AllInOneBlock") and not module.householder:
        changed = slice(module.splits[0], None)
        coupling = make_coupling(module, ["subnet"], see_first, changed, run_affine)
        before = [Mixing(module, before=True)] if module.reverse_pre_permute else []
        return Steps(module, [*before, coupling, Mixing(module)])
    runner = partial(on_copy, run) if kind in WRITES_TO_INPUT else run
    return Called(module, runner, cheap_inverse=has_cheap_inverse(module))


def has_cheap_inverse(module: nn.Module) -> bool:
    names = {cls.__name__ for part in module.modules() for cls in type(part).__mro__}
    return names.isdisjoint(NO_CHEAP_INVERSE)


def make_coupling(
    module: nn.Module, networks: list[str], see: See, changed: slice, run: Run
) -> Coupling:
    """Returns the layer of a coupling, or of one side of it, that changes some channels."""
    # The flip tells exact arithmetic which elements change.
    formula, *factors = find_formula(module, flip=changed.start is None)
    if formula is None:
        return LibraryCoupling(module, networks, see, run)
    said, where = partial(ask, networks, see, *factors), partial(channels, changed)
    return FusedCoupling(module, networks, said, where, formula)


def find_formula(
    module: nn.Module, *, flip: bool
) -> tuple[couplings.Coupling | None, float, float]:
    """Returns a coupling of ours that computes what a module does, or None where we have none.

    With it come factors on the raw log-scales and the shifts that the sub-networks give.
    """
    kind, clamp = type(module).__name__, module.clamp
    make_affine = partial(make_formula, AffineCoupling, flip=flip)
    if kind == "NICECouplingBlock":
        return make_formula(AdditiveCoupling, flip=flip), 1, 1
    if kind == "GINCouplingBlock" or getattr(module, "GIN", False):
        return None, 1, 1
    if kind == "AllInOneBlock":
        return make_affine(scale="tanh", clamp=clamp), 0.1 * clamp, 0.1
    clampings = ("ATAN", "atan", 1), ("TANH", "tanh", clamp), ("SIGMOID", "tanh", clamp / 2)
    for name, scale, factor in clampings:
        if clamps_by(name, module):
            return make_affine(scale=scale, clamp=clamp), factor, 1
    return None, 1, 1


def clamps_by(name: str, module: nn.Module) -> bool:
    """Tells whether a module clamps by the function that FrEIA has under this name."""
    from FrEIA.modules import AffineCouplingOneSided

    options = {"subnet_constructor": lambda *_: None, "clamp_activation": name}
    known = AffineCouplingOneSided([(1,)], **options).f_clamp
    # FrEIA makes a new function for every module, of the same code.
    return getattr(module.f_clamp, "__code__", module.f_clamp) is getattr(known, "__code__", known)


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

    @property
    def stands_for(self) -> nn.Module:
        return self._block[0]

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
    n = count_conditions(module)
    if n and context is None:
        raise ValueError(f"{type(module).__name__} has a condition, so the chain needs a context")
    return (context,) * n


def count_conditions(module: nn.Module) -> int:
    """Tells how many conditions a module takes: where it uses one, it may still take several."""
    from FrEIA.framework import GraphINN, SequenceINN

    if isinstance(module, SequenceINN):
        return max((1 + index for index in module.conditions if index is not None), default=0)
    return len(module.condition_nodes if isinstance(module, GraphINN) else module.dims_c)


def see_side(side: int, module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    """Shows the half that is kept when the first half is changed, or the second."""
    x1, x2 = x.split([module.split_len1, module.split_len2], 1)
    return (torch.cat((x1 if side else x2, *conditions(module, context)), 1),)


def see_first(module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    kept, _ = x.split(module.splits, 1)
    return (torch.cat((kept, *conditions(module, context)), 1),)


def see_condition(module: nn.Module, x: Tensor, context: Tensor | None) -> Streams:
    return conditions(module, context)


def ask(
    networks: list[str],
    see: See,
    raw_factor: float,
    shift_factor: float,
    module: nn.Module,
    x: Tensor,
    context: Tensor | None,
) -> Tensor:
    """Asks one sub-network for raw log-scales and shifts, or one for each."""
    seen = see(module, x, context)
    answers = [module.get_submodule(name)(*seen) for name in networks]
    h = torch.cat(answers, 1) if len(answers) > 1 else answers[0]
    if raw_factor == shift_factor == 1:
        return h
    raw, shift = h.chunk(2, 1)
    return torch.cat((raw_factor * raw, shift_factor * shift), 1)


def run(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    found = conditions(module, context)
    (y,), log_det = module((x,), rev=inverse, **({"c": found} if found else {}))
    return y, log_det


def run_net(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Runs a SequenceINN or a GraphINN, of which some return the one tensor in a tuple."""
    y, log_det = module(x, c=conditions(module, context), rev=inverse)
    return y if isinstance(y, Tensor) else y[0], log_det


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
