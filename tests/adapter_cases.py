"""Modules of other libraries that the tests of the adapters run over; a new one is one line."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Network(nn.Module):
    """A sub-network with everything that is hard to evaluate twice, counting its evaluations."""

    def __init__(
        self, c_in, c_out, *, context=0, dims=1, plain=False, hidden=6, told="hidden_features"
    ):
        super().__init__()
        linear, norm = {
            1: (nn.Linear, nn.BatchNorm1d),
            3: (lambda i, o: nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d),
        }[dims]
        self.first = linear(c_in, hidden)
        self.norm = nn.Identity() if plain else norm(hidden)
        self.drop = nn.Identity() if plain else nn.Dropout(0.2)
        self.last = linear(hidden, c_out)
        self.context = nn.Linear(context, hidden) if context else None
        setattr(self, told, hidden)  # by whose root nflows divides parameters of splines
        self.evaluations = 0

    def forward(self, x, context=None):
        self.evaluations += 1
        h = self.norm(self.first(x))
        if self.context is not None:
            h = h + self.context(context)
        return 0.5 * self.last(self.drop(h.tanh()))


def vary(module):
    """Moves parameters away from zeros and ones, at which a wrong gradient may be right."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)
    module.double()
    for part in module.modules():
        if getattr(part, "w_perm", None) is not None:  # FrEIA draws a rotation in float32
            rotation = torch.linalg.qr(part.w_perm.detach().flatten(1)).Q
            part.w_perm.data = rotation.view_as(part.w_perm)
            part.w_perm_inv.data = rotation.T.reshape(part.w_perm.shape)
    return module


def nflows_coupling(kind="AffineCouplingTransform", mask=(1, 0, 1, 1, 0), net=None, **options):
    from nflows import transforms

    net = {"context": 3, **(net or {})}
    return getattr(transforms, kind)(
        torch.tensor(mask), lambda c_in, c_out: Network(c_in, c_out, **net), **options
    )


def nflows_spline(**options):
    return nflows_coupling(
        "PiecewiseRationalQuadraticCouplingTransform",
        **{"num_bins": 4, "tails": "linear", "tail_bound": 2.0, **options},
    )


def nflows_softplus():
    from nflows import transforms

    class Softplus(transforms.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            shift, raw = transform_params.chunk(2, 1)
            return nn.functional.softplus(raw) + 1e-3, shift

    return Softplus(
        torch.tensor([1, 0, 1, 1, 0]), lambda c_in, c_out: Network(c_in, c_out, context=3)
    )


def nflows_transform(name, *args, **options):
    from nflows import transforms

    return getattr(transforms, name)(*args, **options)


def nflows_composite(coupling=nflows_coupling):
    from nflows import transforms as t

    inner = t.CompositeTransform([t.LULinear(5, identity_init=False), coupling()])
    return t.CompositeTransform([t.RandomPermutation(5), inner, t.InverseTransform(inner)])


def normflows_flow(name, *args, **options):
    from normflows import flows

    return getattr(flows, name)(*args, **options)


def normflows_block(split_mode, scale_map="exp", scale=True, dims=3, channels=4):
    part = 4 if "checkerboard" in split_mode else channels // 2
    c_in = channels - part if split_mode == "channel" else part
    c_out = channels - c_in if "checkerboard" not in split_mode else 4
    net = Network(c_in, (1 + scale) * c_out, dims=dims)
    return normflows_flow("AffineCouplingBlock", net, scale, scale_map, split_mode)


def normflows_block_with_actnorm():
    from normflows import flows
    from normflows.utils.nn import ActNorm

    net = nn.Sequential(
        nn.Linear(3, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.2),
        ActNorm((6,)),
        nn.Tanh(),
        nn.Linear(6, 4),
    )
    return flows.AffineCouplingBlock(net)


def normflows_masked(mask=(1.0, 0.0, 0.0, 1.0), s=True, t=True):
    mask = torch.tensor(mask)
    net = {"c_in": len(mask), "c_out": len(mask), "dims": mask.ndim}
    return normflows_flow(
        "MaskedAffineFlow", mask, Network(**net) if t else None, Network(**net) if s else None
    )


def normflows_model(kind="NormalizingFlow", context=None):
    import normflows as nf

    flows = []
    for _ in range(2):
        flows += [
            nf.flows.CoupledRationalQuadraticSpline(4, 1, 8, context, activation=nn.SiLU),
            nf.flows.LULinearPermute(4),
        ]
    return getattr(nf, kind)(nf.distributions.DiagGaussian(4), flows)


def freia_module(name, dims, cond=None, net=None, **options):
    import FrEIA.modules as fm

    if "Block" in name or "Affine" in name:
        options["subnet_constructor"] = lambda c_in, c_out: Network(
            c_in, c_out, dims=len(dims), **(net or {})
        )
    return getattr(fm, name)([dims], **({"dims_c": [cond]} if cond else {}), **options)


def freia_sequence(cond=None):
    import FrEIA.framework as ff
    import FrEIA.modules as fm

    net = ff.SequenceINN(5)
    options = {"cond": 0, "cond_shape": (3,)} if cond else {}
    for _ in range(2):
        net.append(fm.AllInOneBlock, subnet_constructor=Network, permute_soft=True, **options)
        net.append(fm.PermuteRandom)
        net.append(fm.GLOWCouplingBlock, subnet_constructor=Network, **options)
    return net


def freia_graph(cond=True):
    import FrEIA.framework as ff
    import FrEIA.modules as fm

    nodes = [ff.InputNode(5)]
    condition = ff.ConditionNode(3)
    for _ in range(2):
        options = {"subnet_constructor": Network}
        nodes.append(ff.Node(nodes[-1], fm.RNVPCouplingBlock, options, conditions=condition))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {}))
    return ff.GraphINN([*nodes, ff.OutputNode(nodes[-1]), condition])


class Case(NamedTuple):
    """A module of another library.

    Attributes:
        library: Where it comes from.
        make: Makes it.
        shape: The shape of a batch of data.
        context: The shape of a batch of contexts.
        evaluations: How often each network is evaluated in a step.
        formula: The coupling of ours by which the elements are changed, or None for the library's
            own code.
    """

    library: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6, 5)
    context: tuple[int, ...] | None = None
    evaluations: int | None = None
    formula: str | None = None


def coupling(library, make, formula=None, shape=(6, 5), context=None):
    """Returns the case of a coupling, whose networks are evaluated twice."""
    return Case(library, make, shape, context, 2, formula)


ADDITIVE, AFFINE, SPLINE = "AdditiveCoupling", "AffineCoupling", "SplineCoupling"
IMAGE = (3, 4, 4, 6)
CONTEXT = (6, 3)
CASES = {
    "nflows-affine": coupling("nflows", nflows_coupling, AFFINE, context=CONTEXT),
    "nflows-affine-image": coupling(
        "nflows",
        lambda: nflows_coupling(mask=(0, 1, 1, 0), net={"context": 0, "dims": 3}),
        AFFINE,
        IMAGE,
    ),
    "nflows-affine-softplus": coupling("nflows", nflows_softplus, context=CONTEXT),
    "nflows-additive": coupling(
        "nflows",
        lambda: nflows_coupling("AdditiveCouplingTransform"),
        ADDITIVE,
        context=CONTEXT,
    ),
    "nflows-spline": coupling("nflows", nflows_spline, SPLINE, context=CONTEXT),
    "nflows-spline-image": coupling(
        "nflows",
        lambda: nflows_spline(
            mask=(0, 1, 1, 0), net={"context": 0, "dims": 3, "told": "hidden_channels"}
        ),
        SPLINE,
        IMAGE,
    ),
    "nflows-spline-limits": coupling(
        "nflows",
        lambda: nflows_spline(
            min_bin_width=0.1, min_bin_height=0.05, min_derivative=0.2, net={"told": "width"}
        ),
        SPLINE,
        context=CONTEXT,
    ),
    "nflows-spline-of-many-bins": coupling(
        "nflows", lambda: nflows_spline(num_bins=33), context=CONTEXT
    ),
    "nflows-spline-unconditional": coupling(
        "nflows",
        lambda: nflows_spline(apply_unconditional_transform=True),
        SPLINE,
        context=CONTEXT,
    ),
    "nflows-spline-unconditional-image": coupling(
        "nflows",
        lambda: nflows_spline(
            mask=(0, 1, 1, 0),
            net={"context": 0, "dims": 3},
            apply_unconditional_transform=True,
            img_shape=[4, 6],
        ),
        SPLINE,
        IMAGE,
    ),
    "nflows-cubic-spline": coupling(
        "nflows",
        lambda: nflows_coupling("PiecewiseCubicCouplingTransform", tails="linear"),
        context=CONTEXT,
    ),
    "nflows-inverse-of-unconditional": coupling(
        "nflows",
        lambda: nflows_transform(
            "InverseTransform", nflows_spline(apply_unconditional_transform=True)
        ),
        SPLINE,
        context=CONTEXT,
    ),
    "nflows-composite": Case("nflows", nflows_composite, context=CONTEXT),
    "nflows-lu": Case("nflows", lambda: nflows_transform("LULinear", 5, identity_init=False)),
    "nflows-svd": Case("nflows", lambda: nflows_transform("SVDLinear", 5, 2)),
    "nflows-conv": Case("nflows", lambda: nflows_transform("OneByOneConvolution", 4), IMAGE),
    "nflows-squeeze": Case("nflows", lambda: nflows_transform("SqueezeTransform"), IMAGE),
    "nflows-actnorm": Case("nflows", lambda: nflows_transform("ActNorm", 5)),
    "nflows-autoregressive": Case(
        "nflows",
        lambda: nflows_transform("MaskedAffineAutoregressiveTransform", 5, 8, context_features=3),
        context=CONTEXT,
    ),
    **{
        f"normflows-{mode}-{scale_map}": coupling(
            "normflows",
            lambda mode=mode, scale_map=scale_map: normflows_block(mode, scale_map),
            AFFINE,
            IMAGE,
        )
        for mode, scale_map in (
            ("channel", "exp"),
            ("channel_inv", "sigmoid"),
            ("checkerboard", "sigmoid_inv"),
            ("checkerboard_inv", "exp"),
        )
    },
    **{
        f"normflows-odd-{mode}": coupling(
            "normflows",
            lambda mode=mode: normflows_block(mode, dims=1, channels=5),
            AFFINE,
        )
        for mode in ("channel", "channel_inv")
    },
    "normflows-checkerboard-vector": coupling(
        "normflows",
        lambda: normflows_flow("AffineCouplingBlock", Network(2, 4), split_mode="checkerboard"),
        AFFINE,
        (6, 4),
    ),
    "normflows-additive": coupling(
        "normflows",
        lambda: normflows_block("channel", scale=False, dims=1, channels=5),
        ADDITIVE,
    ),
    "normflows-masked": coupling("normflows", normflows_masked, AFFINE, (6, 4)),
    "normflows-masked-scale": coupling(
        "normflows", lambda: normflows_masked(t=False), AFFINE, (6, 4)
    ),
    "normflows-masked-shift": coupling(
        "normflows", lambda: normflows_masked(s=False), AFFINE, (6, 4)
    ),
    "normflows-masked-image": coupling(
        "normflows",
        lambda: normflows_masked([[[0.0, 1.0] * 3] * 4] * 4),
        AFFINE,
        IMAGE,
    ),
    "normflows-glow": Case("normflows", lambda: normflows_flow("GlowBlock", 4, 5), IMAGE),
    "normflows-glow-actnorm": Case(
        "normflows", lambda: normflows_flow("GlowBlock", 4, 5, net_actnorm=True), IMAGE
    ),
    "normflows-conv": Case("normflows", lambda: normflows_flow("Invertible1x1Conv", 4), IMAGE),
    "normflows-actnorm": Case("normflows", lambda: normflows_flow("ActNorm", (5,))),
    "normflows-actnorm-in-network": Case("normflows", normflows_block_with_actnorm),
    "normflows-reverse": Case(
        "normflows",
        lambda: normflows_flow(
            "Reverse", normflows_flow("CoupledRationalQuadraticSpline", 5, 1, 8)
        ),
    ),
    "normflows-circular": Case(
        "normflows",
        lambda: normflows_flow("CircularCoupledRationalQuadraticSpline", 5, 1, 8, [1, 2]),
    ),
    "normflows-model": Case("normflows", normflows_model, (6, 4)),
    "normflows-conditional-model": Case(
        "normflows",
        lambda: normflows_model("ConditionalNormalizingFlow", 3),
        (6, 4),
        context=CONTEXT,
    ),
    **{
        f"freia-{name}": coupling(
            "FrEIA",
            lambda name=name: freia_module(name, (5,), (3,)),
            formula,
            context=CONTEXT,
        )
        for name, formula in {
            "NICECouplingBlock": ADDITIVE,
            "RNVPCouplingBlock": AFFINE,
            "GLOWCouplingBlock": AFFINE,
            "GINCouplingBlock": None,
            "AffineCouplingOneSided": AFFINE,
            "ConditionalAffineTransform": AFFINE,
            "AllInOneBlock": AFFINE,
        }.items()
    },
    **{
        f"freia-{name}-{clamping}": coupling(
            "FrEIA",
            lambda name=name, clamping=clamping: freia_module(
                name, (5,), clamp=1.3, clamp_activation=clamping
            ),
            AFFINE,
        )
        for name in ("RNVPCouplingBlock", "GLOWCouplingBlock")
        for clamping in ("ATAN", "TANH", "SIGMOID")
    },
    "freia-glow-of-own-clamping": coupling(
        "FrEIA",
        lambda: freia_module(
            "GLOWCouplingBlock", (5,), clamp_activation=lambda raw: 0.636 * torch.atan(raw)
        ),
    ),
    "freia-glow-without-clamping": coupling(
        "FrEIA", lambda: freia_module("GLOWCouplingBlock", (5,), clamp=0.0)
    ),
    "freia-glow-image": coupling(
        "FrEIA",
        lambda: freia_module("GLOWCouplingBlock", IMAGE[1:], split_len=1),
        AFFINE,
        IMAGE,
    ),
    "freia-all-in-one-image": coupling(
        "FrEIA",
        lambda: freia_module(
            "AllInOneBlock",
            IMAGE[1:],
            reverse_permutation=True,
            permute_soft=True,
            affine_clamping=1.3,
        ),
        AFFINE,
        IMAGE,
    ),
    "freia-all-in-one-gin": coupling(
        "FrEIA", lambda: freia_module("AllInOneBlock", (5,), gin_block=True)
    ),
    "freia-all-in-one-householder": Case(
        "FrEIA",
        lambda: freia_module("AllInOneBlock", (5,), learned_householder_permutation=2),
    ),
    "freia-actnorm": Case("FrEIA", lambda: freia_module("ActNorm", (5,))),
    "freia-haar": Case("FrEIA", lambda: freia_module("HaarDownsampling", IMAGE[1:]), IMAGE),
    "freia-flatten": Case("FrEIA", lambda: freia_module("Flatten", IMAGE[1:]), IMAGE),
    "freia-sequence": Case("FrEIA", freia_sequence, (6, 5)),
    "freia-conditional-sequence": Case(
        "FrEIA", lambda: freia_sequence(cond=True), (6, 5), CONTEXT
    ),
    "freia-graph": Case("FrEIA", freia_graph, (6, 5), CONTEXT),
}
