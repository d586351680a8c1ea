"""Adapted modules compute what the user's own modules do, in memory that is flat in depth."""

import copy
import pickle
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_cases import (
    CASES,
    IMAGE,
    Case,
    Network,
    freia_module,
    nflows_coupling,
    nflows_spline,
    vary,
)
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from revlib import use_kernels
from revlib.flows import AdditiveCoupling, AffineCoupling, FlowSequential, SplineCoupling, Split
from revlib.flows.adapters import from_freia, from_nflows, from_normflows
from revlib.functional import _coupling
from revlib.memory import measure_step

# The libraries call functions of PyTorch that are deprecated, and warn of networks of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inputs to the softmax are not scaled down"),
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
]

ADAPTERS = {"nflows": from_nflows, "normflows": from_normflows, "FrEIA": from_freia}


TWO_SIDED_BY_OURS = "NICECouplingBlock", "RNVPCouplingBlock", "GLOWCouplingBlock"

both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def own(case, module, x, context, *, inverse=False):
    """Runs a module as its own library does, from data to latent or back."""
    x = x.clone()  # some modules write to it
    if case.library == "FrEIA":
        single = not hasattr(module, "module_list")
        c = {} if context is None else {"c": [context]}
        y, log_det = module((x,) if single else x, rev=inverse, **c)
        y = y[0] if single else y
    elif case.library == "nflows":
        y, log_det = (module.inverse if inverse else module)(x, context)
    else:
        # A model of normflows adds up log_dets in float32.
        flows = list(getattr(module, "flows", [module]) if hasattr(module, "q0") else [module])
        args = () if context is None else (context,)
        y, log_det = x, 0
        for flow in flows if inverse else reversed(flows):
            y, term = (flow if inverse else flow.inverse)(y, *args)
            log_det = log_det + term
    return y, log_det + torch.zeros(len(x), dtype=x.dtype)


def draw(case):
    """Draws what goes into a module of the case."""
    x = torch.randn(case.shape, dtype=torch.double, requires_grad=True)
    if case.context is None:
        return x, None
    return x, torch.randn(case.context, dtype=torch.double, requires_grad=True)


def step(run, x, context, module):
    """Runs a step; returns results and gradients, and the buffers it leaves."""
    torch.manual_seed(1)
    y, log_det = run(x, context)
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    loss = (weights * y.sin()).sum() + (torch.arange(1, len(y) + 1) * log_det).sum()
    inputs = [t for t in (x, context) if t is not None]
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [*inputs, *parameters.values()], allow_unused=True)
    names = ["x", "context"][: len(inputs)] + list(parameters)
    found = {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}
    found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    return {"output": y.detach(), "log_det": log_det.detach(), **found}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None or got[name] is None:
            # A library may give zeros where nothing depends on a parameter, or None.
            assert all(t is None or not t.any() for t in (got[name], want[name])), name
        else:
            torch.testing.assert_close(
                got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


def cases(condition=lambda case: True):
    chosen = [name for name, case in CASES.items() if condition(case)]
    return pytest.mark.parametrize("name", chosen)


def make(name):
    case = CASES[name]
    pytest.importorskip(case.library)
    return case, vary(case.make())


@both_directions
@cases()
def test_results_and_gradients_are_those_of_the_users_module(name, inverse):
    case, module = make(name)
    reference = copy.deepcopy(module)
    chain = ADAPTERS[case.library](module)
    x, context = draw(case)
    if inverse:
        with torch.no_grad():
            x = own(case, copy.deepcopy(module).eval(), x, context)[0].requires_grad_()

    want = step(lambda x, c: own(case, reference, x, c, inverse=inverse), x, context, reference)
    got = step(chain.inverse if inverse else chain, x, context, module)

    assert_equal(got, want)


def test_a_transform_of_the_users_own_is_called_whole_three_times():
    transforms = pytest.importorskip("nflows.transforms")

    class Shift(transforms.Transform):
        def __init__(self):
            super().__init__()
            self.net = Network(2, 2, plain=True)

        def forward(self, inputs, context=None):
            kept, x = inputs.chunk(2, 1)
            return torch.cat((kept, x + self.net(kept)), 1), inputs.new_zeros(len(inputs))

        def inverse(self, inputs, context=None):
            kept, x = inputs.chunk(2, 1)
            return torch.cat((kept, x - self.net(kept)), 1), inputs.new_zeros(len(inputs))

    module = Shift().double()
    reference = copy.deepcopy(module)
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)

    want = step(lambda x, _: reference(x), x, None, reference)
    got = step(from_nflows(module), x, None, module)

    assert_equal(got, want)
    assert module.net.evaluations == 3


@both_directions
@pytest.mark.parametrize(
    "name", ["nflows-spline-unconditional", "freia-GLOWCouplingBlock", "freia-AllInOneBlock"]
)
def test_networks_that_change_buffers_may_run_twice_before_backward(name, inverse):
    case, module = make(name)
    for part in module.modules():
        if isinstance(part, Network):
            spectral_norm(part.first)
    reference = copy.deepcopy(module)
    chain = ADAPTERS[case.library](module)
    x, context = draw(case)

    def run_twice(run):
        runs = [run(x, context), run(0.5 * x, context)]
        return [torch.cat(parts) for parts in zip(*runs, strict=True)]

    own_run = partial(own, case, reference, inverse=inverse)
    want = step(lambda *_: run_twice(own_run), x, context, reference)
    got = step(lambda *_: run_twice(chain.inverse if inverse else chain), x, context, module)

    assert_equal(got, want)


@both_directions
@cases(lambda case: case.evaluations)
def test_each_network_is_evaluated_so_often(name, inverse):
    case, module = make(name)
    chain = ADAPTERS[case.library](module)
    x, context = draw(case)

    step(chain.inverse if inverse else chain, x, context, module)

    networks = [part for part in module.modules() if isinstance(part, Network)]
    assert [network.evaluations for network in networks] == [case.evaluations] * len(networks)


@both_directions
@cases(lambda case: case.evaluations)
def test_couplings_of_which_we_have_the_formula_are_run_by_it(name, inverse, monkeypatch):
    case, module = make(name)
    chain = ADAPTERS[case.library](module)
    ran = set()

    def spy(kind, method):
        run = getattr(kind, method)

        def spied(*args, **options):
            ran.add((kind.__name__, method))
            return run(*args, **options)

        monkeypatch.setattr(kind, method, spied)

    for kind in (AdditiveCoupling, AffineCoupling, SplineCoupling):
        spy(kind, "couple")
        spy(kind, "couple_backward")
    x, context = draw(case)

    step(chain.inverse if inverse else chain, x, context, module)

    methods = ("couple", "couple_backward") if case.formula else ()
    assert ran == {(case.formula, method) for method in methods}


@both_directions
@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("nflows-affine", ["affine_coupling"]),
        ("nflows-spline", ["spline_coupling"]),
        ("nflows-spline-unconditional", ["spline_coupling", "spline_coupling"]),
        ("normflows-channel-exp", ["affine_coupling"]),
        ("freia-GLOWCouplingBlock", ["affine_coupling", "affine_coupling"]),
    ],
)
def test_with_kernels_every_op_runs_once_each_way(name, ops, inverse, monkeypatch):
    pytest.importorskip("triton")
    case, module = make(name)
    reference = copy.deepcopy(module)
    chain = ADAPTERS[case.library](module)
    ran, kernels = [], _coupling.kernels
    monkeypatch.setattr(_coupling, "kernels", lambda op: (ran.append(op), kernels(op))[1])
    x, context = draw(case)

    want = step(partial(own, case, reference, inverse=inverse), x, context, reference)
    with use_kernels(True):
        got = step(chain.inverse if inverse else chain, x, context, module)

    assert ran == 2 * ops
    assert_equal(got, want)


plain_kinds = pytest.mark.parametrize(
    "kind", ["nflows-affine", "nflows-spline", "normflows", "GLOWCouplingBlock", "AllInOneBlock"]
)


def plain_chain(kind, depth):
    """Returns a model of so many couplings as its own library puts it together."""
    net = {"plain": True, "context": 0, "hidden": 64}
    if kind.startswith("nflows"):
        transforms = pytest.importorskip("nflows.transforms")
        coupling, options = nflows_coupling, {}
        if kind == "nflows-spline":
            # Elements beyond the bound would take less memory, in some layers more than in others.
            coupling, options = nflows_spline, {"tail_bound": 1000.0}
        return from_nflows(
            transforms.CompositeTransform(
                [coupling(mask=(1, 0) * 8, net=net, **options) for _ in range(depth)]
            )
        )
    if kind == "normflows":
        nf = pytest.importorskip("normflows")
        blocks = [
            nf.flows.AffineCouplingBlock(Network(8, 16, **net), split_mode=mode)
            for mode in ("channel", "channel_inv") * (depth // 2)
        ]
        return from_normflows(nf.NormalizingFlow(nf.distributions.DiagGaussian(16), blocks))
    ff = pytest.importorskip("FrEIA.framework")
    modules = pytest.importorskip("FrEIA.modules")
    sequence = ff.SequenceINN(16)
    for _ in range(depth):
        sequence.append(
            getattr(modules, kind), subnet_constructor=lambda i, o: Network(i, o, **net)
        )
    return from_freia(sequence)


@both_directions
@plain_kinds
def test_rebuilt_gradients_are_the_stored_ones_under_autocast(kind, inverse):
    chain = plain_chain(kind, 4)
    stored = FlowSequential(*copy.deepcopy(chain), policy="store")
    x = torch.randn(32, 16, requires_grad=True)

    def results(chain, *, enabled=True):
        def run(x, _):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return (chain.inverse if inverse else chain)(x)

        return step(run, x, None, chain)

    got, want, exact = results(chain), results(stored), results(stored, enabled=False)

    assert got["output"].dtype == torch.float32
    for name, value in want.items():
        if value is not None and value.is_floating_point():
            # What is rebuilt may round to the next bfloat16, as in the library's own couplings.
            error, allowed = got[name] - value, exact[name] - value
            assert error.norm() <= 4 * allowed.norm(), name


@both_directions
@plain_kinds
def test_peak_memory_does_not_grow_with_depth(kind, inverse, monkeypatch):
    # The peak needs no hooks, under which what nflows writes in place keeps itself alive.
    monkeypatch.setattr("revlib.memory.saved_tensors_hooks", lambda *_: nullcontext())

    def peak(depth):
        chain = plain_chain(kind, depth)
        run = chain.inverse if inverse else chain
        x = torch.randn(32, 16)

        def step():
            y, log_det = run(x)
            (y.sum() + log_det.sum()).backward()

        return measure_step(step, model=chain).peak.activations

    assert peak(depth=8) == peak(depth=2)


exact_kinds = pytest.mark.parametrize(
    "kind", ["nflows-affine", "normflows", *TWO_SIDED_BY_OURS, "AllInOneBlock"]
)


@both_directions
@exact_kinds
def test_an_exact_chain_is_the_stored_one_to_the_last_bit(kind, inverse):
    chain = FlowSequential(*plain_chain(kind, 4), exact=True)
    stored = FlowSequential(*copy.deepcopy(chain), exact=True, policy="store")
    x = torch.randn(32, 16, requires_grad=True)

    want = step(lambda x, _: (stored.inverse if inverse else stored)(x), x, None, stored)
    got = step(lambda x, _: (chain.inverse if inverse else chain)(x), x, None, chain)

    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want if want[name] is not None)


@both_directions
@pytest.mark.parametrize("kind", ["normflows", *TWO_SIDED_BY_OURS])
def test_peak_memory_of_an_exact_chain_does_not_grow_with_depth(kind, inverse):
    def peak(depth):
        chain = FlowSequential(*plain_chain(kind, depth), exact=True)
        run = chain.inverse if inverse else chain
        x = torch.randn(32, 16)

        def step():
            y, log_det = run(x)
            (y.sum() + log_det.sum()).backward()

        return measure_step(step, model=chain).peak.activations

    assert peak(depth=8) == pytest.approx(peak(depth=2), rel=0.05)


@pytest.mark.slow
@both_directions
@pytest.mark.parametrize(
    "name",
    [
        "nflows-affine",
        "nflows-spline",
        "normflows-channel-exp",
        "freia-GLOWCouplingBlock",
        "freia-AllInOneBlock",
    ],
)
def test_a_chain_without_gradients_compiles_to_one_graph(name, inverse):
    case, module = make(name)
    chain = ADAPTERS[case.library](module.eval())
    run = chain.inverse if inverse else chain
    x, context = draw(case)
    torch.compiler.reset()

    with torch.no_grad():
        got = torch.compile(run, fullgraph=True, backend="eager")(x, context)

        torch.testing.assert_close(got, run(x, context))


@cases()
def test_parameters_are_the_users_own_and_once_in_the_state_dict(name):
    case, module = make(name)

    chain = ADAPTERS[case.library](module)

    assert held(chain) == held(module)


def held(module):
    """Counts how often each parameter is in the state dict, but for a base distribution's."""
    return Counter(
        id(tensor)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, nn.Parameter) and not name.startswith("q0.")
    )


@pytest.mark.parametrize("name", ["nflows-spline-unconditional", "freia-AllInOneBlock"])
def test_a_copy_of_a_chain_has_modules_of_its_own(name):
    case, module = make(name)
    chain = ADAPTERS[case.library](module).eval()
    x, context = draw(case)
    want, _ = chain(x, context)

    twin = copy.deepcopy(chain)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)

    assert not torch.equal(chain(x, context)[0], want)
    assert torch.equal(twin(x, context)[0], want)


@pytest.mark.parametrize(
    "name", ["nflows-spline-unconditional", "normflows-checkerboard_inv-exp", "normflows-masked"]
)
def test_a_chain_can_be_pickled(name):
    case, module = make(name)
    chain = ADAPTERS[case.library](module).eval()
    x, context = draw(case)

    twin = pickle.loads(pickle.dumps(chain))

    assert torch.equal(twin(x, context)[0], chain(x, context)[0])


@pytest.mark.parametrize("name", [name for name in CASES if "actnorm" in name])
def test_actnorm_is_set_by_the_first_batch_and_not_again_in_backward(name):
    case, module = make(name)
    chain = ADAPTERS[case.library](module)
    x, _ = draw(case)
    before = copy.deepcopy(module.state_dict())
    z, _ = chain(x)
    after = {key: (t.clone(), t.data_ptr()) for key, t in module.state_dict().items()}

    z.square().sum().backward()

    assert any(not torch.equal(before[key], value) for key, (value, _) in after.items())
    for key, t in module.state_dict().items():
        value, address = after[key]
        assert torch.equal(t, value) and t.data_ptr() == address, key


def test_actnorm_of_nflows_is_not_set_by_a_backward_pass_through_its_inverse():
    _, module = make("nflows-actnorm")
    chain = from_nflows(module)

    chain.inverse(torch.randn(6, 5, dtype=torch.double))[0].sum().backward()

    assert not module.initialized


def test_batch_norm_of_nflows_trains():
    transforms = pytest.importorskip("nflows.transforms")
    module = vary(transforms.BatchNorm(5))
    reference = copy.deepcopy(module)
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)

    want = step(lambda x, c: reference(x), x, None, reference)
    got = step(from_nflows(module), x, None, module)

    assert_equal(got, want)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nflows MaskedAffineAutoregressiveTransform", {"features": 4, "hidden_features": 8}),
        ("nflows LULinear", {"features": 4, "using_cache": True}),
        ("normflows Planar", {"shape": (4,)}),
        ("normflows Radial", {"shape": (4,)}),
        ("normflows MaskedAffineAutoregressive", {"features": 4, "hidden_features": 8}),
        ("FrEIA IResNetLayer", {"dims_in": [(4,)]}),
    ],
)
def test_what_has_no_cheap_inverse_is_stored(name, options):
    library, kind = name.split()
    place = {"nflows": "transforms", "normflows": "flows", "FrEIA": "modules"}[library]
    module = getattr(pytest.importorskip(f"{library}.{place}"), kind)(**options)

    chain = ADAPTERS[library](module)

    assert chain.policies() == ["store"]


@both_directions
def test_a_circular_spline_of_normflows_trains_on_what_is_beyond_its_bound(inverse):
    case, module = make("normflows-circular")
    reference = copy.deepcopy(module)
    chain = from_normflows(module)
    x = 6 * torch.randn(16, 5, dtype=torch.double)
    x.requires_grad_()

    want = step(lambda x, c: own(case, reference, x, c, inverse=inverse), x, None, reference)
    got = step(chain.inverse if inverse else chain, x, None, module)

    assert_equal(got, want)


def test_planar_flows_of_normflows_train_on_samples():
    flows = pytest.importorskip("normflows.flows")
    module = vary(flows.Planar((4,)))
    reference = copy.deepcopy(module)
    z = torch.randn(6, 4, dtype=torch.double, requires_grad=True)

    want = step(lambda z, c: reference(z), z, None, reference)
    got = step(from_normflows(module).inverse, z, None, module)

    assert_equal(got, want)


def test_a_multiscale_flow_of_normflows_becomes_a_chain_with_splits():
    nf = pytest.importorskip("normflows")
    merges = [nf.flows.Merge()]
    flows = [
        [nf.flows.GlowBlock(8, 6), nf.flows.Squeeze()],
        [nf.flows.GlowBlock(4, 6), nf.flows.Squeeze()],
    ]
    bases = [nf.distributions.DiagGaussian((8, 2, 2)), nf.distributions.DiagGaussian((2, 4, 4))]
    transform = nf.transforms.Shift()
    module = vary(nf.MultiscaleFlow(bases, flows, merges, transform, class_cond=False)).eval()
    x = torch.randn(3, 1, 8, 8, dtype=torch.double)
    chain = from_normflows(module)

    latents, log_det = chain(x.clone())
    again, _ = chain.inverse(latents)

    want, want_log_det = module.inverse_and_log_det(x.clone())
    assert sum(isinstance(layer, Split) for layer in chain) == 1
    for got, latent in zip(latents, want[::-1], strict=True):
        torch.testing.assert_close(got, latent)
    torch.testing.assert_close(log_det, want_log_det)
    torch.testing.assert_close(again, x)


def test_a_flow_of_nflows_gives_its_transform():
    flows = pytest.importorskip("nflows.flows")
    coupling = nflows_coupling()
    flow = flows.Flow(coupling, nn.Identity())

    (layer,) = from_nflows(flow)

    assert layer.module is coupling


def test_a_flow_of_nflows_that_embeds_its_context_is_refused():
    flows = pytest.importorskip("nflows.flows")
    flow = flows.Flow(nflows_coupling(), nn.Identity(), embedding_net=nn.Linear(3, 3))

    with pytest.raises(ValueError, match=r"does not embed its context.*got a flow with Linear"):
        from_nflows(flow)


@pytest.mark.parametrize("library", ADAPTERS)
def test_anything_else_is_refused(library):
    pytest.importorskip(library)

    with pytest.raises(TypeError, match=rf"module must be a .* of {library}.*; got Linear"):
        ADAPTERS[library](nn.Linear(2, 2))


def test_flows_of_normflows_that_take_pairs_are_refused():
    nf = pytest.importorskip("normflows")

    with pytest.raises(TypeError, match="such as AffineCouplingBlock; got Split"):
        from_normflows([nf.flows.Split()])


def test_a_multiscale_composite_of_nflows_is_refused():
    transforms = pytest.importorskip("nflows.transforms")

    with pytest.raises(TypeError, match=r"from its parts with revlib\.flows\.Split"):
        from_nflows(transforms.MultiscaleCompositeTransform(2))


def test_modules_of_freia_with_several_tensors_are_refused():
    modules = pytest.importorskip("FrEIA.modules")

    with pytest.raises(ValueError, match="from one tensor to one tensor; Split does not"):
        from_freia(modules.Split([(4,)]))


def test_a_graph_of_freia_with_two_inputs_is_refused():
    ff = pytest.importorskip("FrEIA.framework")
    modules = pytest.importorskip("FrEIA.modules")
    inputs = [ff.InputNode(2), ff.InputNode(3)]
    both = ff.Node([node.out0 for node in inputs], modules.Concat, {})
    graph = ff.GraphINN([*inputs, both, ff.OutputNode(both)])

    with pytest.raises(ValueError, match=r"one input and one output; got 2 and 1"):
        from_freia(graph)


def test_merges_of_normflows_by_a_checkerboard_are_refused():
    nf = pytest.importorskip("normflows")
    bases = [nf.distributions.DiagGaussian(2), nf.distributions.DiagGaussian(2)]
    model = nf.MultiscaleFlow(bases, [[], []], [nf.flows.Merge("checkerboard")])

    with pytest.raises(ValueError, match="mode 'channel'; got 'checkerboard'"):
        from_normflows(model)


def test_several_conditions_of_freia_are_refused():
    modules = pytest.importorskip("FrEIA.modules")
    block = modules.GLOWCouplingBlock([(4,)], [(3,), (2,)], subnet_constructor=Network)

    with pytest.raises(ValueError, match=r"must share one condition.*got 2"):
        from_freia(block)


def test_a_missing_condition_of_freia_is_named():
    pytest.importorskip("FrEIA")
    chain = from_freia(freia_module("GLOWCouplingBlock", (5,), (3,)))

    with pytest.raises(ValueError, match="GLOWCouplingBlock has a condition"):
        chain(torch.randn(6, 5))


def freia_net(kind, sequence=None):
    """Returns a SequenceINN or a GraphINN of two couplings, of which one has a condition."""
    ff = pytest.importorskip("FrEIA.framework")
    modules = pytest.importorskip("FrEIA.modules")
    options = {"subnet_constructor": Network}
    if kind == "SequenceINN":
        net = (sequence or ff.SequenceINN)(5)
        net.append(modules.GLOWCouplingBlock, **options)
        net.append(modules.GLOWCouplingBlock, cond=1, cond_shape=(3,), **options)
        return vary(net)
    start, condition = ff.InputNode(5), ff.ConditionNode(3)
    first = ff.Node(start, modules.GLOWCouplingBlock, options)
    second = ff.Node(first, modules.GLOWCouplingBlock, options, conditions=condition)
    return vary(ff.GraphINN([start, condition, first, second, ff.OutputNode(second)]))


@pytest.mark.parametrize("kind", ["SequenceINN", "GraphINN"])
def test_a_net_of_freia_with_hooks_is_called_whole(kind):
    net = freia_net(kind)
    reference = copy.deepcopy(net)
    seen = []
    net.register_forward_hook(lambda *_: seen.append(1))
    chain = from_freia(net)
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    context = torch.randn(6, 3, dtype=torch.double, requires_grad=True)

    def run(x, c):
        return reference(x, c=[c] if kind == "GraphINN" else [None, c])

    want = step(run, x, context, reference)
    got = step(chain, x, context, net)

    assert_equal(got, want)
    assert len(chain) == 1
    assert seen


def test_a_sequence_of_freia_that_overrides_forward_is_run_by_its_own():
    ff = pytest.importorskip("FrEIA.framework")

    class Doubling(ff.SequenceINN):
        def forward(self, x, c=None, rev=False, jac=True):
            y, log_det = super().forward(x if rev else 2 * x, c, rev, jac)
            return (y / 2 if rev else y), log_det

    net = freia_net("SequenceINN", Doubling).eval()
    x, context = torch.randn(6, 5).double(), torch.randn(6, 3).double()

    z, _ = from_freia(net)(x, context)

    torch.testing.assert_close(z, net(x, c=[None, context])[0])


def test_a_net_of_freia_that_is_called_whole_is_stored_if_a_part_has_no_cheap_inverse():
    net = freia_net("SequenceINN")
    net.append(pytest.importorskip("FrEIA.modules").IResNetLayer)
    net.register_forward_hook(lambda *_: None)

    assert from_freia(net).policies() == ["store"]


def test_a_composite_of_nflows_that_overrides_inverse_alone_is_run_by_its_own():
    transforms = pytest.importorskip("nflows.transforms")

    class Noting(transforms.CompositeTransform):
        def inverse(self, inputs, context=None):
            x, log_det = super().inverse(inputs, context)
            return x, log_det + 1

    module = Noting([transforms.LULinear(5)])
    z = torch.randn(6, 5)

    _, log_det = from_nflows(module).inverse(z)

    torch.testing.assert_close(log_det, module.inverse(z)[1])


def test_a_composite_of_nflows_that_is_called_whole_is_stored_if_a_part_has_no_cheap_inverse():
    transforms = pytest.importorskip("nflows.transforms")
    module = transforms.CompositeTransform([transforms.Sigmoid()])
    module.register_forward_hook(lambda *_: None)

    assert from_nflows(module).policies() == ["store"]


def constant(c_in, c_out):
    """Returns a sub-network that is a plain function."""
    return lambda x, context=None: x.new_full((len(x), c_out), 0.3)


@both_directions
@pytest.mark.parametrize("library", ["nflows", "FrEIA"])
def test_a_coupling_with_a_function_as_sub_network_is_called_whole(library, inverse):
    if library == "nflows":
        transforms = pytest.importorskip("nflows.transforms")
        module = transforms.AffineCouplingTransform([1, 0, 1, 0, 0], constant)
    else:
        modules = pytest.importorskip("FrEIA.modules")
        module = modules.GLOWCouplingBlock([(5,)], subnet_constructor=constant)
    chain = ADAPTERS[library](module)
    case, x = Case(library, None), torch.randn(6, 5, dtype=torch.double, requires_grad=True)

    want = step(lambda x, c: own(case, module, x, c, inverse=inverse), x, None, module)
    got = step(chain.inverse if inverse else chain, x, None, module)

    assert_equal(got, want)


def test_a_module_with_hooks_is_called_whole():
    pytest.importorskip("nflows")
    coupling = nflows_coupling()
    seen = []
    coupling.register_forward_hook(lambda *_: seen.append(1))

    chain = from_nflows(coupling)
    chain(torch.randn(6, 5), torch.randn(6, 3))

    assert seen == [1]


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("nflows-spline", "transform_net"),
        ("normflows-channel-exp", "flows.1.param_map"),
        ("normflows-masked", "s"),
        ("freia-RNVPCouplingBlock", "subnet_t1"),
    ],
)
def test_hooks_on_sub_networks_fire(name, network):
    case, module = make(name)
    chain = ADAPTERS[case.library](module)
    seen = []
    module.get_submodule(network).register_forward_hook(lambda *_: seen.append(1))
    x, context = draw(case)

    chain(x, context)[0].sum().backward()

    assert seen == [1, 1]


def test_an_affine_coupling_of_normflows_with_hooks_inside_a_block_is_called_by_the_block():
    _, block = make("normflows-channel-exp")
    seen = []
    block.flows[1].register_forward_hook(lambda *_: seen.append(1))
    chain = from_normflows(block)

    chain.inverse(torch.randn(IMAGE, dtype=torch.double))

    assert seen


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("nflows-affine", "_scale_and_shift"),
        ("nflows-spline", "_piecewise_cdf"),
        ("freia-GLOWCouplingBlock", "_coupling1"),
        ("freia-AllInOneBlock", "_affine"),
    ],
)
def test_a_method_that_an_object_replaces_is_run(name, method):
    case, module = make(name)
    ran, run = [], getattr(module, method)
    setattr(module, method, lambda *args, **options: (ran.append(1), run(*args, **options))[1])
    x, context = draw(case)

    ADAPTERS[case.library](module)(x, context)

    assert ran


def test_a_stream_with_more_features_than_a_coupling_of_nflows_has_is_refused():
    pytest.importorskip("nflows")
    chain = from_nflows(nflows_coupling())

    with pytest.raises(ValueError, match=r"must be \[batch, 5, \.\.\.\]; got \[6, 6\]"):
        chain(torch.randn(6, 6), torch.randn(6, 3))


class Constant(nn.Module):
    """A sub-network that gives one row for all samples, which the libraries broadcast."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1, c_out))

    def forward(self, x, context=None):
        return self.row


def test_one_row_of_a_sub_network_for_all_samples_is_refused():
    transforms = pytest.importorskip("nflows.transforms")
    chain = from_nflows(transforms.AdditiveCouplingTransform([1, 0, 1], Constant))

    with pytest.raises(ValueError, match=r"block 0 .* must return \[6, 2\].*; got \[1, 2\]"):
        chain(torch.randn(6, 3))


def test_a_stream_of_one_dimension_is_refused():
    nf = pytest.importorskip("normflows")
    chain = from_normflows(nf.flows.AffineCouplingBlock(Network(2, 4)))

    with pytest.raises(ValueError, match=r"block 0 .* must be \[batch, \.\.\.\]; got \[6\]"):
        chain(torch.randn(6))


class Failing(nn.Module):
    def __init__(self, *sizes):
        super().__init__()

    def forward(self, x, context=None):
        raise ValueError


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AffineCouplingTransform", {}),
        ("PiecewiseQuadraticCouplingTransform", {"tails": "linear"}),
    ],
)
def test_notes_name_the_users_coupling_and_sub_network(kind, options):
    transforms = pytest.importorskip("nflows.transforms")
    chain = from_nflows(getattr(transforms, kind)([1, 0, 1], Failing, **options))

    with pytest.raises(ValueError) as caught:
        chain(torch.randn(6, 3))

    (note,) = caught.value.__notes__
    assert note.startswith(f"raised in block 0 ({kind}), evaluating Failing on [6, 3]")


@both_directions
def test_notes_name_the_users_module_that_is_called_whole(inverse):
    transforms = pytest.importorskip("nflows.transforms")
    chain = from_nflows(transforms.LULinear(4))

    with pytest.raises(Exception) as caught:
        (chain.inverse if inverse else chain)(torch.randn(6, 3))

    (note,) = caught.value.__notes__
    assert note.startswith("raised in block 0 (LULinear), evaluating LULinear on [6, 3]")


def test_a_scale_that_users_chose_in_a_later_version_of_nflows_is_used(monkeypatch):
    transforms = pytest.importorskip("nflows.transforms")
    monkeypatch.setattr(
        transforms.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION", torch.sigmoid, False
    )
    layers = []
    for activation in (torch.sigmoid, torch.exp):
        coupling = nflows_coupling()
        coupling.scale_activation = activation
        layers += from_nflows(coupling)

    assert [type(layer).__name__ for layer in layers] == ["FusedCoupling", "LibraryCoupling"]


@pytest.mark.slow
def test_importing_flows_imports_no_other_library():
    code = (
        "import sys, revlib.flows.adapters; "
        "print([name for name in ('nflows', 'normflows', 'FrEIA') if name in sys.modules])"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "[]"


PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


@pytest.mark.parametrize("library", ADAPTERS)
def test_the_examples_on_the_page_run(library):
    pytest.importorskip(library)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    chosen = [block for block in blocks if re.search(rf"^(from|import) {library}\b", block, re.M)]

    assert chosen
    for block in chosen:
        exec(compile(block, PAGE.name, "exec"), {})
