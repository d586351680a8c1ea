"""The sub-networks that couplings of flows come with."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.flows import MLP, AffineCoupling, GlowConvNet, ResidualConvNet
from revlib.memory import measure_step
from revlib.testing import check_gradients

VECTOR, IMAGE = (3,), (3, 4, 6)


@dataclass(frozen=True)
class Case:
    """A network from 3 to 6 channels, the shape of a sample, and that of its context."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    context: tuple[int, ...] | None = None

    def inputs(self, batch: int = 5) -> tuple[Tensor, ...]:
        shapes = (self.shape,) if self.context is None else (self.shape, self.context)
        return tuple(torch.randn(batch, *shape) for shape in shapes)


mlp = partial(MLP, 3, 6, (8, 8))
residual = partial(ResidualConvNet, 3, 6, 8, 2)
glow = partial(GlowConvNet, 3, 6, 8)

WITHOUT_CONTEXT = {
    "mlp": Case(mlp, VECTOR),
    "mlp-linear": Case(partial(MLP, 3, 6, ()), VECTOR),
    "residual": Case(residual, IMAGE),
    "glow": Case(glow, IMAGE),
}
WITH_CONTEXT = {
    "mlp-context": Case(partial(mlp, context_features=2), VECTOR, (2,)),
    "residual-context": Case(partial(residual, context_channels=2), IMAGE, (2,)),
    "residual-context-image": Case(partial(residual, context_channels=2), IMAGE, (2, 4, 6)),
    "glow-context": Case(partial(glow, context_channels=2), IMAGE, (2,)),
    "glow-context-image": Case(partial(glow, context_channels=2), IMAGE, (2, 4, 6)),
}
CASES = WITHOUT_CONTEXT | WITH_CONTEXT

every_net = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_net_with_context = pytest.mark.parametrize("case", WITH_CONTEXT.values(), ids=WITH_CONTEXT)
every_conv_net = pytest.mark.parametrize("make", [residual, glow], ids=["residual", "glow"])


def awake(net: nn.Module) -> nn.Module:
    """Moves the last layer of a network away from zero, where it starts."""
    *_, last = net.modules()
    last.reset_parameters()
    return net


def mlp_reference(net: MLP, x: Tensor, context: Tensor) -> Tensor:
    first, second, last = (layer for layer in net.layers if isinstance(layer, nn.Linear))
    h = F.relu(F.linear(torch.cat((x, context), 1), first.weight, first.bias))
    h = F.relu(F.linear(h, second.weight, second.bias))
    return F.linear(h, last.weight, last.bias)


def conv3x3(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def add_context(conv: nn.Module, h: Tensor, context: Tensor) -> Tensor:
    weight = conv.context_conv.weight[:, :, 0, 0]
    return h + torch.einsum("oc,bc...->bo...", weight, context).view(*h.shape[:2], 1, 1)


def residual_reference(net: ResidualConvNet, x: Tensor, context: Tensor | None = None) -> Tensor:
    h = conv3x3(net.first.conv, x)
    if context is not None:
        h = add_context(net.first, h, context)
    for block in net.blocks:
        h = h + conv3x3(block.second, F.relu(conv3x3(block.first, F.relu(h))))
    return F.conv2d(F.relu(h), net.last.weight, net.last.bias)


def glow_reference(net: GlowConvNet, x: Tensor, context: Tensor | None = None) -> Tensor:
    h = conv3x3(net.first.conv, x)
    if context is not None:
        h = add_context(net.first, h, context)
    h = F.conv2d(F.relu(h), net.middle.weight, net.middle.bias)
    return conv3x3(net.last, F.relu(h))


REFERENCES = {
    "mlp-context": mlp_reference,
    "residual-context": residual_reference,
    "glow-context": glow_reference,
}


@every_net
@pytest.mark.parametrize("batch", [5, 0])
def test_output_has_the_channels_asked_for_and_the_shape_of_the_input(case: Case, batch):
    net, inputs = case.make(), case.inputs(batch)

    assert net(*inputs).shape == (batch, 6, *case.shape[1:])


@every_net
def test_output_starts_as_zero(case: Case):
    net, inputs = case.make(), case.inputs()

    assert net(*inputs).count_nonzero() == 0


@every_net
def test_coupling_starts_as_the_identity(case: Case):
    coupling = AffineCoupling(case.make())
    _, *context = case.inputs()
    x = torch.randn(5, 6, *case.shape[1:])

    z, log_det = coupling(x, *context)

    assert torch.equal(z, x)
    assert log_det.count_nonzero() == 0


@pytest.mark.parametrize("name", REFERENCES)
def test_output_is_that_of_the_layers_in_the_docstring(name):
    net, inputs = awake(CASES[name].make()).double(), CASES[name].inputs()
    inputs = [x.double() for x in inputs]

    torch.testing.assert_close(net(*inputs), REFERENCES[name](net, *inputs))


@every_net_with_context
def test_context_changes_the_output_and_receives_a_gradient(case: Case):
    net, (x, context) = awake(case.make()), case.inputs()
    context.requires_grad_()

    output = net(x, context)
    output.sin().sum().backward()

    assert not torch.allclose(output, net(x, context + 1))
    assert (context.grad != 0).any(dim=0).all()


@every_conv_net
def test_context_vector_is_the_same_at_every_pixel(make):
    net = awake(make(context_channels=2))
    x, vector = torch.randn(5, *IMAGE), torch.randn(5, 2)
    image = vector[:, :, None, None].expand(5, 2, 4, 6)

    torch.testing.assert_close(net(x, vector), net(x, image))


@every_conv_net
@pytest.mark.parametrize("factors", [(2, 2), (1, 3)])
def test_larger_context_is_averaged_to_the_size_of_the_input(make, factors):
    net = awake(make(context_channels=2))
    x, context = torch.randn(5, *IMAGE), torch.randn(5, 2, 4 * factors[0], 6 * factors[1])
    means = context.unflatten(3, (6, -1)).unflatten(2, (4, -1)).mean((3, 5))

    torch.testing.assert_close(net(x, context), net(x, means))


@every_net
def test_every_parameter_receives_a_gradient(case: Case):
    net, inputs = awake(case.make()), case.inputs()

    net(*inputs).sin().sum().backward()

    assert all(parameter.grad.count_nonzero() for parameter in net.parameters())


@every_net
def test_input_is_left_as_it_was(case: Case):
    net, inputs = awake(case.make()), case.inputs()
    before = [x.clone() for x in inputs]

    net(*inputs)

    assert all(torch.equal(x, copy) for x, copy in zip(inputs, before, strict=True))


@every_net
def test_output_of_a_sample_depends_on_it_alone_in_training_and_evaluation(case: Case):
    net, inputs = awake(case.make()).double(), [x.double() for x in case.inputs()]

    together = net.train()(*inputs)
    alone = net.eval()(*(x[:1] for x in inputs))

    torch.testing.assert_close(alone, together[:1])


@every_net
def test_net_in_double_computes_in_double(case: Case):
    net, inputs = awake(case.make()), case.inputs()

    output = deepcopy(net).double()(*(x.double() for x in inputs))

    assert output.dtype == torch.double
    torch.testing.assert_close(net(*inputs), output.float())


@pytest.mark.slow
@every_net
def test_net_compiles_to_one_graph(case: Case):
    net, inputs = awake(case.make()), case.inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(*inputs), net(*inputs))


@every_net
def test_net_can_be_pickled(case: Case):
    net, inputs = awake(case.make()), case.inputs()

    again = pickle.loads(pickle.dumps(net))

    assert torch.equal(again(*inputs), net(*inputs))


@every_net
def test_gradients_in_a_coupling_are_those_of_a_stored_run(case: Case):
    coupling = AffineCoupling(awake(case.make()))
    _, *context = case.inputs()

    check_gradients(coupling, torch.randn(5, 6, *case.shape[1:]), *context)


def peak_bytes(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    def step() -> None:
        run(x).sum().backward()

    step()
    return measure_step(step, model=net).peak.activations


@pytest.mark.parametrize(
    ("make", "reference"),
    [(ResidualConvNet, residual_reference), (GlowConvNet, glow_reference)],
)
def test_peak_memory_is_no_higher_than_out_of_place(make, reference):
    net = awake(make(3, 6, 16))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)

    assert peak_bytes(net, net, x) <= peak_bytes(net, lambda x: reference(net, x), x)


def test_mlp_has_the_activation_asked_for():
    net = MLP(3, 6, (8, 4), activation=nn.Tanh)

    assert [type(layer).__name__ for layer in net.layers] == [
        "Linear", "Tanh", "Linear", "Tanh", "Linear",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keys"),
    {
        "mlp-context": "layers.0.weight layers.0.bias layers.2.weight layers.2.bias "
        "layers.4.weight layers.4.bias",
        "residual": "first.conv.weight first.conv.bias "
        "blocks.0.first.weight blocks.0.first.bias "
        "blocks.0.second.weight blocks.0.second.bias "
        "blocks.1.first.weight blocks.1.first.bias "
        "blocks.1.second.weight blocks.1.second.bias "
        "last.weight last.bias",
        "glow-context": "first.conv.weight first.conv.bias first.context_conv.weight "
        "middle.weight middle.bias last.weight last.bias",
    }.items(),
)
def test_state_dict_keys_are_stable(name, keys):
    assert list(CASES[name].make().state_dict()) == keys.split()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLP(0, 6), ValueError, "MLP: c_in must be from 1 to .*; got 0"),
        (lambda: MLP(3, 6.0), TypeError, "MLP: c_out must be an integer; got 6.0"),
        (lambda: MLP(3, 6, 64), TypeError, "MLP: hidden must be a sequence of widths; got 64"),
        (lambda: MLP(3, 6, (8, 0)), ValueError, r"MLP: hidden\[1\] must be from 1 to .*; got 0"),
        (
            lambda: MLP(3, 6, context_features=-1),
            ValueError,
            "MLP: context_features must be from 0 to .*; got -1",
        ),
        (
            lambda: MLP(3, 6, activation=nn.ReLU()),
            TypeError,
            r"MLP: activation must build a module .*; got ReLU\(\)",
        ),
        (
            lambda: ResidualConvNet(3, 6, blocks=0),
            ValueError,
            "ResidualConvNet: blocks must be from 1 to .*; got 0",
        ),
        (
            lambda: GlowConvNet(3, 6, hidden=True),
            TypeError,
            "GlowConvNet: hidden must be an integer; got True",
        ),
        (
            lambda: GlowConvNet(3, 6, context_channels=None),
            TypeError,
            "GlowConvNet: context_channels must be an integer; got None",
        ),
    ],
)
def test_bad_argument_is_named_with_the_rule_and_the_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mlp", (5, 4), r"MLP: x must be \[batch, 3\]; got \[5, 4\]"),
        ("mlp", (5, 3, 1), r"MLP: x must be \[batch, 3\]; got \[5, 3, 1\]"),
        (
            "residual",
            (5, 4, 4, 6),
            r"ResidualConvNet: x must be \[batch, 3, height, width\]; got \[5, 4, 4, 6\]",
        ),
        ("glow", (5, 3), r"GlowConvNet: x must be \[batch, 3, height, width\]; got \[5, 3\]"),
    ],
)
def test_input_of_another_shape_is_refused(name, shape, message):
    net = CASES[name].make()

    with pytest.raises(ValueError, match=message):
        net(torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mlp-context", (5, 3), r"MLP: context must be \[5, 2\]; got \[5, 3\]"),
        ("mlp-context", (1, 2), r"MLP: context must be \[5, 2\]; got \[1, 2\]"),
        (
            "glow-context",
            (5, 3),
            r"GlowConvNet: context must be \[5, 2\] or \[5, 2, height, width\]; got \[5, 3\]",
        ),
        (
            "residual-context",
            (5, 3, 4, 6),
            r"ResidualConvNet: context must be .* or \[5, 2, height, width\]; got \[5, 3, 4, 6\]",
        ),
        (
            "residual-context",
            (5, 2, 2, 3),
            "ResidualConvNet: height and width of context must be those of x, 4 and 6, or "
            "multiples of them; got 2 and 3",
        ),
        ("glow-context", (5, 2, 8, 9), "multiples of them; got 8 and 9"),
    ],
)
def test_context_of_another_shape_is_refused(name, shape, message):
    net, (x, _) = CASES[name].make(), CASES[name].inputs()

    with pytest.raises(ValueError, match=message):
        net(x, torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "rule"),
    {
        "mlp": "MLP: context must be None, for context_features is 0",
        "residual": "ResidualConvNet: context must be None, for context_channels is 0",
        "glow": "GlowConvNet: context must be None, for context_channels is 0",
    }.items(),
)
def test_context_that_the_net_was_not_built_for_is_refused(name, rule):
    net, (x,) = CASES[name].make(), CASES[name].inputs()

    with pytest.raises(ValueError, match=rf"{rule}; got one of shape \[5, 2\]"):
        net(x, torch.randn(5, 2))


@pytest.mark.parametrize(
    ("name", "rule"),
    {
        "mlp-context": "MLP: context must be given, for context_features is 2",
        "residual-context": "ResidualConvNet: context must be given, for context_channels is 2",
        "glow-context": "GlowConvNet: context must be given, for context_channels is 2",
    }.items(),
)
def test_missing_context_is_refused(name, rule):
    net, (x, _) = CASES[name].make(), CASES[name].inputs()

    with pytest.raises(ValueError, match=f"{rule}; got None"):
        net(x)
