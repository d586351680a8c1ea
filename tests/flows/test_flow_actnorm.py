"""ActNorm sets its parameters once, by the first batch that trains it, and never again."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from revlib.flows import ActNorm, ActNormConv1x1, FlowSequential, NonFiniteError

CHANNELS = 4

every_policy = pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])


def batch(seed: int, shape: tuple[int, ...] = (6, CHANNELS, 3, 3)) -> Tensor:
    """Data whose channels have means and variances of their own."""
    x = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    channel = torch.arange(1.0, shape[1] + 1, dtype=torch.double)
    return (x + seed) * channel.view(-1, *(1,) * (x.ndim - 2))


def parameters(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def make_layer() -> ActNorm:
    return ActNorm(CHANNELS).double()


def trained_layer() -> ActNorm:
    layer = make_layer()
    layer(batch(1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1
    return layer


@pytest.mark.parametrize("shape", [(64, CHANNELS), (6, CHANNELS, 3, 3), (3, CHANNELS, 2, 2, 2)])
def test_first_batch_leaves_with_mean_0_and_variance_1_in_every_channel(shape):
    z, _ = make_layer()(batch(1, shape))

    others = [dim for dim in range(len(shape)) if dim != 1]
    torch.testing.assert_close(z.mean(others), torch.zeros(CHANNELS, dtype=torch.double))
    torch.testing.assert_close(
        z.var(others, correction=0), torch.ones(CHANNELS, dtype=torch.double)
    )


def test_second_batch_changes_nothing():
    layer = make_layer()
    layer(batch(1))
    before = parameters(layer)

    layer(batch(2))

    assert_equal(parameters(layer), before)


@pytest.mark.parametrize("x", [batch(1), batch(1)[:0]], ids=["eval", "nothing"])
def test_batches_that_do_not_train_change_nothing(x):
    layer = make_layer().train(len(x) == 0)
    before = parameters(layer)

    layer(x)

    assert_equal(parameters(layer), before)
    assert not layer.initialized


def test_first_training_batch_decides_after_batches_in_eval_mode():
    layer, other = make_layer().eval(), make_layer()

    layer(batch(2))
    layer.train()(batch(1))
    other(batch(1))

    assert_equal(parameters(layer), parameters(other))


def test_samples_of_an_untrained_flow_decide_nothing():
    layer, other = make_layer(), make_layer()

    layer.inverse(batch(2))
    layer(batch(1))
    other(batch(1))

    assert_equal(parameters(layer), parameters(other))


def test_parameters_trained_through_inverse_are_kept():
    layer = make_layer()
    with torch.no_grad():
        layer.bias += 0.5
    before = parameters(layer)

    layer(batch(1))

    assert_equal(parameters(layer), before)


def test_first_batch_under_no_grad_decides():
    layer, other = make_layer(), make_layer()

    with torch.no_grad():
        layer(batch(1))
    other(batch(1))

    assert_equal(parameters(layer), parameters(other))


def test_first_batch_that_is_not_finite_raises_and_changes_nothing():
    layer = make_layer()
    x = batch(1)
    x[0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match="cannot start from a batch that is not finite"):
        layer(x)
    layer(batch(1))

    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_trained_state_dict_is_not_initialised_anew(assign):
    layer, trained = make_layer(), trained_layer()

    layer.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
    layer(batch(2))

    assert_equal(parameters(layer), parameters(trained))


def test_an_untrained_state_dict_is_initialised_by_the_next_batch():
    layer, other = trained_layer(), make_layer()

    layer.load_state_dict(make_layer().state_dict())
    layer(batch(2))
    other(batch(2))

    assert_equal(parameters(layer), parameters(other))


def test_a_run_resumes_as_if_it_had_not_stopped():
    def train(model: FlowSequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            optimizer.zero_grad()
            z, log_det = model(batch(i))
            (z.square().sum() - log_det.sum()).backward()
            optimizer.step()

    def start() -> tuple[FlowSequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = FlowSequential(ActNorm(CHANNELS), ActNormConv1x1(CHANNELS)).double()
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    whole, stopped, resumed = start(), start(), start()
    train(*whole, range(1, 7))
    train(*stopped, range(1, 4))

    for part, saved in zip(resumed, stopped, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(*resumed, range(4, 7))

    assert_equal(parameters(resumed[0]), parameters(whole[0]))


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_is_initialised_by_itself_and_only_if_the_original_was_not(clone):
    untrained, trained = make_layer(), trained_layer()

    copies = [clone(untrained), clone(trained)]
    for layer in copies:
        layer(batch(2))

    want = make_layer()
    want(batch(2))
    assert_equal(parameters(copies[0]), parameters(want))
    assert_equal(parameters(copies[1]), parameters(trained))
    assert not untrained.initialized


def test_scale_and_convolution_in_one_start_as_the_two_in_a_row():
    torch.manual_seed(0)
    folded = ActNormConv1x1(CHANNELS).double()
    row = FlowSequential(copy.deepcopy(folded.actnorm), copy.deepcopy(folded.conv))

    got, want = folded(batch(1)), row(batch(1))

    torch.testing.assert_close(got, want)
    assert_equal(parameters(folded.actnorm), parameters(row[0]))


def make_chain(policy: str) -> FlowSequential:
    torch.manual_seed(0)
    inner = FlowSequential(ActNorm(CHANNELS), ActNormConv1x1(CHANNELS), policy="recompute")
    layers = [ActNorm(CHANNELS), ActNormConv1x1(CHANNELS), inner, ActNorm(CHANNELS)]
    return FlowSequential(*layers, policy=policy).double()


def first_steps(
    chain: FlowSequential, run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
) -> list[Tensor]:
    """Returns the gradients of two steps, on different batches, and the parameters."""
    found = []
    for seed in (1, 2):
        x = batch(seed).requires_grad_()
        z, log_det = (run or chain)(x)
        (z.sin().sum() + (log_det * torch.arange(1.0, 7.0)).sum()).backward()
        found.append(x.grad)
    return [*found, *(p.grad for p in chain.parameters()), *chain.parameters()]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_first_steps_of_a_chain_are_those_of_a_stored_one(policy):
    assert_close(first_steps(make_chain(policy)), first_steps(make_chain("store")))


@every_policy
def test_first_step_inside_checkpoint(policy):
    chain = make_chain(policy)

    got = first_steps(chain, lambda x: checkpoint(chain, x, use_reentrant=False))

    assert_close(got, first_steps(make_chain("store")))


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_first_step_of_a_layer_with_a_hook_which_is_called_whole(policy):
    chain = make_chain(policy)
    for layer in chain:
        layer.register_forward_hook(lambda *_: None)

    assert_close(first_steps(chain), first_steps(make_chain("store")))


@every_policy
def test_backward_twice_through_the_first_step_gives_the_same_gradients(policy):
    chain = make_chain(policy)
    x = batch(1).requires_grad_()
    z, log_det = chain(x)
    loss = z.sin().sum() + log_det.sum()

    first = torch.autograd.grad(loss, [x, *chain.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *chain.parameters()])

    assert all(map(torch.equal, first, second))


@every_policy
def test_backward_changes_no_parameter(policy):
    chain = make_chain(policy)
    z, log_det = chain(batch(1).requires_grad_())
    before = parameters(chain)

    (z.sin().sum() + log_det.sum()).backward()

    assert_equal(parameters(chain), before)


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_a_batch_between_forward_and_backward_raises_if_it_set_the_parameters(policy):
    chain = FlowSequential(ActNorm(CHANNELS), policy=policy).double().eval()
    x = batch(1).requires_grad_()
    z, log_det = chain(x)

    chain.train()(batch(2))

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (z.sin().sum() + log_det.sum()).backward()


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_switching_to_train_between_forward_and_backward_initialises_nothing(policy):
    gradients = []
    for name in (policy, "store"):
        chain = FlowSequential(ActNorm(CHANNELS), policy=name).double().eval()
        x = batch(1).requires_grad_()
        z, log_det = chain(x)
        chain.train()
        (z.sin().sum() + log_det.sum()).backward()
        gradients.append([x.grad, *(p.grad for p in chain.parameters())])

    assert not chain[0].initialized
    assert_close(*gradients)


def test_first_batch_in_half_precision_sets_parameters_by_statistics_in_float32():
    layer, truth = ActNorm(CHANNELS).bfloat16(), make_layer()
    x = (200 + batch(1)).bfloat16()

    layer(x)
    truth(x.double())

    for got, want in zip(layer.parameters(), truth.parameters(), strict=True):
        # The parameters themselves are rounded to bfloat16, and to nothing shorter.
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


def test_frozen_layer_is_initialised_all_the_same():
    layer, other = make_layer().requires_grad_(False), make_layer()

    FlowSequential(layer)(batch(1))
    other(batch(1))

    assert_equal(parameters(layer), parameters(other))


COMPILED = """
import torch
from revlib.flows import ActNorm, FlowSequential

x = 5 + torch.randn(20, 4)
chain, other = FlowSequential(ActNorm(4)), ActNorm(4)

compiled = torch.compile(chain, backend="eager", fullgraph=True)
with torch.no_grad():
    try:
        compiled(x)
    except RuntimeError as error:
        assert "block 0 (ActNorm): ActNorm is to be set by its first batch; let" in str(error)
    else:
        raise AssertionError("no error")
    chain(x)
    assert torch.equal(compiled(2 * x)[0], chain(2 * x)[0])

layer = ActNorm(4)
torch.compile(layer, backend="eager")(x)
other(x)
assert all(map(torch.equal, layer.parameters(), other.parameters()))
"""


# In a process of its own: a compilation that failed changes when this one frees its tensors.
@pytest.mark.slow
def test_a_first_batch_may_be_compiled_unless_into_one_graph_which_an_error_says():
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
