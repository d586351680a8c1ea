"""Gaussian log_prob as a kernel, against its definition in float64."""

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
each_prior = pytest.mark.parametrize("learned", [True, False], ids=["learned", "standard"])


def draw(shape, dtype, device, learned, layout=oracle.contiguous):
    """A latent, and for a learned prior its conditioner's output; a gradient of the log_prob."""
    batch, channels, *space = shape
    tensors = (torch.randn(shape), torch.randn(batch, 2 * channels, *space) / 2)[: 1 + learned]
    return [layout(tensor.to(device, dtype)) for tensor in tensors], torch.randn(batch).to(device)


def check(inputs, dlog_prob, interleaved=False):
    """The log_prob, and the gradients that autograd gives."""

    def op(*inputs):
        return (functional.gaussian_log_prob(*inputs, interleaved=interleaved),)

    def definition(x, h=None):
        return (reference.gaussian_log_prob(x, h, interleaved),)

    got = oracle.outputs_and_gradients(op, inputs, [dlog_prob])

    eager = oracle.outputs_and_gradients(definition, inputs, [dlog_prob])
    exact = oracle.outputs_and_gradients(definition, oracle.double(inputs), [dlog_prob.double()])
    oracle.assert_close_enough(("log_prob", "dx", "dh")[: len(got)], got, eager, exact)


@pytest.mark.slow
@each_prior
@every_dtype
@every_shape
def test_log_prob_and_gradients_are_as_close_to_exact_as_eager(shape, dtype, learned, device):
    check(*draw(shape, dtype, device, learned))


@each_prior
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 4, 16, 16)], ids=str)
def test_any_layout_gives_the_same(shape, layout, interleaved, learned, device):
    check(*draw(shape, torch.float32, device, learned, layout), interleaved)


@each_prior
def test_float64_is_float64_throughout(learned, device):
    inputs, _ = draw((2, 3, 5, 7), torch.float64, device, learned)
    h = inputs[1] if learned else None

    got = functional.gaussian_log_prob(*inputs)

    want = reference.gaussian_log_prob(inputs[0], h, False)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_float32_latent_meets_a_conditioner_in_half_precision(device):
    (x, h), dlog_prob = draw((2, 3, 5, 7), torch.float32, device, learned=True)

    check((x, h.bfloat16()), dlog_prob)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 6, 1, 1), (1, 6, 5, 7)], ids=str)
def test_expanded_prior_is_read_as_it_is(shape, device):
    from revlib.kernels.walk import walkable

    x, small = torch.randn(2, 3, 5, 7, device=device), torch.randn(shape, device=device)
    h = small.expand(2, 6, 5, 7)

    check((x, h), torch.randn(2, device=device))
    assert walkable(h)[0] is h


@each_prior
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, learned, device):
    inputs, dlog_prob = draw(shape, torch.float32, device, learned)

    check(inputs, dlog_prob)
    assert functional.gaussian_log_prob(*inputs).tolist() == [0.0] * shape[0]


@each_prior
def test_runs_are_bitwise_alike(learned, device):
    inputs, _ = draw((2, 4, 33, 31), torch.float32, device, learned)

    first, second = (functional.gaussian_log_prob(*inputs) for _ in range(2))

    assert torch.equal(first, second)


def test_only_the_inputs_are_saved(device):
    (x, h), _ = draw((2, 4, 5, 7), torch.float32, device, learned=True)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        functional.gaussian_log_prob(x.requires_grad_(), h)

    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), h.data_ptr()]


@pytest.mark.slow
@each_prior
def test_custom_ops_pass_opcheck(learned, device):
    from revlib.kernels import gaussian_log_prob as kernels

    inputs, dlog_prob = draw((2, 4, 5, 7), torch.float32, device, learned)
    x, h = inputs if learned else (*inputs, None)

    torch.library.opcheck(kernels.gaussian_log_prob, (x, h, True))
    torch.library.opcheck(kernels.gaussian_log_prob_gradients, (x, h, dlog_prob, True))


@each_prior
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(learned, device):
    inputs, _ = draw((2, 4, 5, 7), torch.float32, device, learned)

    compiled = torch.compile(functional.gaussian_log_prob, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(*inputs), functional.gaussian_log_prob(*inputs))


def test_gradients_have_no_gradients(device):
    (x, h), _ = draw((2, 3), torch.float32, device, learned=True)
    log_prob = functional.gaussian_log_prob(x.requires_grad_(), h)

    (dx,) = torch.autograd.grad(log_prob.square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_switch_turns_kernels_off(device):
    (x, h), _ = draw((2, 3), torch.float32, device, learned=True)

    with revlib.use_kernels(False):
        log_prob = functional.gaussian_log_prob(x.requires_grad_(), h)

    assert "GaussianLogProbFunction" not in log_prob.grad_fn.name()
