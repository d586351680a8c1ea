"""Memory of one step against figures worked out by hand: which tensors are alive, and when.

Unless said otherwise the peak is in backward, where two small tensors are alive as well: the
loss and the gradient that backward starts from, four bytes each.
"""

import gc
import subprocess
import sys
from itertools import accumulate
from math import prod

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from revlib.memory import MemorySplit, StepMemory, measure_step
from revlib.tracker import Tracker

LOSS = 4
SEED = 4


def floats(*shape: int) -> int:
    """Returns the bytes of a float32 tensor."""
    return 4 * prod(shape)


def mlp(*, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.ReLU(inplace), nn.Linear(128, 32, bias=False)
    )


MLP_WEIGHTS = floats(64, 128) + floats(128, 32)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(16, 64)


# What is alive when


def test_mlp(x):
    model = mlp()

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    hidden = floats(16, 128)
    assert memory.peak == MemorySplit(
        # Backward of ReLU: its output, the gradient that arrives, the gradient that leaves.
        activations=3 * hidden + LOSS + SEED,
        parameters=MLP_WEIGHTS,
        gradients=MLP_WEIGHTS,
        optimizer_state=0,
        # A moment later: only the gradient that left, but both weights' gradients.
        total=hidden + LOSS + SEED + 2 * MLP_WEIGHTS,
    )
    # ReLU and the second layer keep the same tensor; the first layer keeps x, the caller's.
    # The first weight is not kept, for x needs no gradient.
    assert memory.saved == MemorySplit(
        activations=hidden,
        parameters=floats(128, 32),
        gradients=0,
        optimizer_state=0,
        total=hidden + floats(128, 32),
    )


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(2, 3, 16, 16)

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    # As in the MLP: ReLU's output and the gradients on both of its sides.
    assert memory.peak.activations == 3 * floats(2, 8, 16, 16) + LOSS + SEED
    assert memory.saved.activations == floats(2, 8, 16, 16)
    assert memory.peak.gradients == floats(8, 3, 3, 3) + floats(8) + floats(4, 8, 3, 3) + floats(4)


@pytest.mark.parametrize(
    ("inplace", "tensors"), [(False, 2), (True, 1)], ids=["out-of-place", "in-place"]
)
def test_in_place_relu_needs_no_second_tensor(x, inplace, tensors):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(inplace))

    memory = measure_step(lambda: model(x), model=model)

    assert memory.peak.activations == tensors * floats(16, 128)
    assert memory.saved.activations == floats(16, 128)


def test_batch_norm():
    model = nn.BatchNorm1d(32)
    x = torch.randn(64, 32)

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    statistics = 2 * floats(32)  # the batch's mean and inverse deviation
    running = 2 * floats(32)
    counter = 8  # num_batches_tracked
    assert memory.peak.activations == floats(64, 32) + statistics + LOSS  # end of forward
    assert memory.saved.activations == statistics
    assert memory.peak.parameters == floats(32) + floats(32) + running + counter
    assert memory.saved.parameters == floats(32) + running


def test_views_share_one_storage(x):
    def step() -> torch.Tensor:
        with torch.no_grad():
            h = x * x
            return h.view(-1).reshape(32, 32).t()[3:, ::2].unsqueeze(0)

    assert measure_step(step).peak.activations == floats(16, 64)


def test_a_view_keeps_its_whole_storage():
    weight = torch.ones(64, requires_grad=True)

    def step() -> torch.Tensor:
        h = weight.exp()
        return h[:2].exp()

    # The first exp keeps its result, all of it; the second its own, of two elements.
    assert measure_step(step).saved.activations == floats(64) + floats(2)


def test_expanded_tensor_counts_its_storage():
    assert measure_step(lambda: torch.zeros(8, 1).expand(8, 1000)).peak.activations == floats(8)


def test_dropout_keeps_a_mask_of_its_own_type():
    x = torch.randn(64, 64, requires_grad=True)

    on_cpu = measure_step(lambda: F.dropout(x, 0.5))
    fused = measure_step(lambda: torch.native_dropout(x, 0.5, True))

    assert on_cpu.saved.activations == floats(64, 64)
    assert fused.saved.activations == 64 * 64  # one byte per element


def test_out_argument_counts_once():
    x = torch.randn(64)

    def step() -> torch.Tensor:
        out = torch.empty(64)
        return torch.add(x, x, out=out)

    assert measure_step(step).peak.activations == floats(64)


def test_resized_tensor_counts_its_new_size():
    assert measure_step(lambda: torch.empty(16).resize_(64)).peak.activations == floats(64)


def test_emptied_storage_counts_no_more():
    weight = torch.ones(64, requires_grad=True)

    def step() -> torch.Tensor:
        h = weight.exp()
        h.untyped_storage().resize_(0)
        return weight.exp()

    memory = measure_step(step)

    # The first result is emptied before the second is there.
    assert memory.peak.activations == floats(64)
    assert memory.saved.activations == floats(64)


@pytest.mark.parametrize(
    "make",
    [lambda: torch.zeros(2, 3), lambda: torch.randn(2, 3), lambda: torch.tensor([[0.0] * 3] * 2)],
    ids=["zeros", "randn", "tensor"],
)
def test_what_the_step_makes_from_nothing_counts(make):
    assert measure_step(make).peak.activations == floats(2, 3)


def test_non_reentrant_checkpoint(x):
    first, second = mlp(), mlp()
    widen = nn.Linear(32, 64, bias=False)
    model = nn.ModuleList([first, widen, second])

    def step() -> None:
        h = checkpoint(first, x, use_reentrant=False)
        h = checkpoint(second, widen(h), use_reentrant=False)
        h.sum().backward()

    memory = measure_step(step, model=model)

    narrow, wide, hidden = floats(16, 32), floats(16, 64), floats(16, 128)
    # Kept: the input of `widen`, and the second segment's input; the first one's is x.
    assert memory.saved.activations == narrow + wide
    # Backward of the second segment's ReLU: the two kept, ReLU's three tensors, and the
    # output, which `h` holds.
    assert memory.peak.activations == narrow + wide + 3 * hidden + narrow + LOSS + SEED


class Rebuild(torch.autograd.Function):
    """Layers of `x + tanh(w)`; backward undoes them and returns all gradients at its end."""

    @staticmethod
    def forward(ctx, x, *weights):
        for weight in weights:
            x = x + torch.tanh(weight)
        ctx.save_for_backward(x, *weights)
        return x

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        gradients = []
        for weight in reversed(weights):
            leaf = weight.detach().requires_grad_()
            with torch.enable_grad():
                update = torch.tanh(leaf)
            x = x - update.detach()
            gradients += torch.autograd.grad(update, leaf, dy)
        return None, *reversed(gradients)


@pytest.mark.parametrize("depth", [2, 8])
def test_gradients_in_flight_are_gradients(x, depth):
    weights = nn.ParameterList(torch.randn(16, 64) for _ in range(depth))

    memory = measure_step(lambda: Rebuild.apply(x, *weights).sum().backward(), model=weights)

    tensor = floats(16, 64)
    # The second layer undone: the output, the update, and x before and after. The gradients
    # are all held until the last layer is undone.
    assert memory.peak.activations == 4 * tensor + LOSS + SEED
    assert memory.peak.gradients == depth * tensor


def test_what_backward_rebuilds_is_not_saved(x):
    weights = nn.ParameterList(torch.randn(16, 64) for _ in range(8))

    memory = measure_step(lambda: Rebuild.apply(x, *weights).sum().backward(), model=weights)

    assert memory.saved.activations == floats(16, 64)


def test_saved_tensor_counts_until_its_last_holder_lets_go():
    weight = torch.ones(64, requires_grad=True)

    def step() -> torch.Tensor:
        h = weight.exp()
        h.sin()  # keeps h, and is dropped
        return h.exp()

    # Both exp keep their results.
    assert measure_step(step).saved.activations == 2 * floats(64)


def test_graph_that_backward_builds_to_last_is_saved():
    weight = torch.ones(64, requires_grad=True)

    def step() -> None:
        (slope,) = torch.autograd.grad(weight.exp().sum(), weight, create_graph=True)
        slope.exp().sum().backward()

    # The first graph keeps exp(w), and so does the product with it that backward recorded;
    # slope.exp() keeps its result. The product's other factor is the expanded seed.
    assert measure_step(step).saved.activations == 2 * floats(64) + SEED


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_graph_that_backward_builds_last_of_all_is_saved(keep):
    weight = torch.ones(64, requires_grad=True)
    kept = []

    def step() -> None:
        slopes = torch.autograd.grad(weight.exp().sum(), weight, create_graph=True)
        if keep:
            kept.append(slopes)

    # Only when backward has recorded its product there is the expanded seed to keep.
    assert measure_step(step).saved.activations == floats(64) + SEED


def test_two_microbatches_save_what_one_does(x):
    model = mlp()

    def step() -> None:
        for _ in range(2):
            model(x).sum().backward()

    assert measure_step(step, model=model).saved.activations == floats(16, 128)


# What is what


def test_caller_s_tensors_are_left_out(x):
    model = nn.Linear(64, 64, bias=False)

    def step() -> None:
        x.mul_(2)
        model(x.view(8, 2, 64)[:4]).sum().backward()

    memory = measure_step(step, model=model)

    # The output until the loss is there.
    assert memory.peak.activations == floats(4, 2, 64) + LOSS
    assert memory.saved.activations == 0


def test_first_gradients_replace_those_freed_by_the_step(x):
    model = mlp()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    step()

    assert measure_step(step, model=model).peak.gradients == MLP_WEIGHTS


def test_gradients_freed_before_the_step_ends_are_gradients(x):
    model = mlp()

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    memory = measure_step(step, model=model)

    assert memory.peak.gradients == MLP_WEIGHTS
    assert memory.peak.activations == 3 * floats(16, 128) + LOSS + SEED


def test_gradient_added_to_an_earlier_one_is_a_gradient(x):
    model = mlp()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()

    step()
    memory = measure_step(step, model=model)

    # All the earlier ones, and the larger of the two that arrive one after the other.
    assert memory.peak.gradients == MLP_WEIGHTS + floats(64, 128)
    assert memory.peak.activations == 3 * floats(16, 128) + LOSS + SEED


@pytest.mark.parametrize("drop", [False, True], ids=["kept", "dropped"])
def test_gradient_that_is_copied_to_its_parameter_is_a_gradient(drop):
    weight = nn.Parameter(torch.randn(64))

    def step() -> None:
        weight.sum().backward()
        if drop:
            weight.grad = None

    memory = measure_step(step, model=nn.ParameterList([weight]))

    # What arrives is the seed, expanded: it cannot become `.grad`, which is dense.
    assert memory.peak.gradients == SEED + floats(64)
    assert memory.peak.activations == LOSS


def test_summands_of_a_shared_parameter_s_gradient_are_gradients(x):
    layer = nn.Linear(64, 64, bias=False)

    memory = measure_step(lambda: layer(layer(layer(x))).sum().backward(), model=layer)

    # Two gradients of the weight, before the second is added to the first.
    assert memory.peak.gradients == 2 * floats(64, 64)
    # Two saved outputs, the gradient of the second, the gradient of the first.
    assert memory.peak.activations == 3 * floats(16, 64) + LOSS + SEED


def test_adam(x):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    counters = 2 * 4  # one float32 scalar per parameter
    for _ in range(2):
        memory = measure_step(step, model=model, optimizer=optimizer)
        assert memory.peak.optimizer_state == 2 * MLP_WEIGHTS + counters
        assert memory.saved.optimizer_state == 0


def test_optimizer_alone_tells_parameters_and_gradients(x):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    memory = measure_step(lambda: model(x).sum().backward(), optimizer=optimizer)

    assert memory.peak.parameters == memory.peak.gradients == MLP_WEIGHTS


def test_without_model_and_optimizer_gradients_are_activations(x):
    layer = nn.Linear(64, 64, bias=False)

    memory = measure_step(lambda: layer(x).sum().backward())

    assert memory.peak.gradients == memory.peak.parameters == 0
    assert memory.peak.activations == LOSS + SEED + floats(64, 64)


def test_frozen_parameters_have_no_gradients(x):
    model = mlp().requires_grad_(False)
    model[2].requires_grad_(True)

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    assert memory.peak.gradients == floats(128, 32)


def test_sparse_gradient_counts_its_indices_and_values():
    model = nn.Embedding(1000, 16, sparse=True)
    tokens = torch.tensor([1, 5, 7])

    memory = measure_step(lambda: model(tokens).sum().backward(), model=model)

    # Three int64 indices and three rows, which arrive as the seed expanded and are copied.
    assert memory.peak.gradients == 3 * 8 + SEED + floats(3, 16)


def test_sum_of_sparse_gradients_is_a_gradient():
    model = nn.Embedding(1000, 16, sparse=True)
    tokens = torch.tensor([1, 5, 7])

    def step() -> None:
        (model(tokens).exp() + model(tokens).exp()).sum().backward()

    memory = measure_step(step, model=model)

    # Two addends of three rows each, which use the tokens as their indices; and the sum, with
    # six rows and indices of its own.
    assert memory.peak.gradients == 2 * floats(3, 16) + floats(6, 16) + 6 * 8


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("layout", "indices"), [(torch.sparse_coo, 2 * 8), (torch.sparse_csr, 9 + 8)], ids=str
)
def test_sparse_tensor_counts_its_parts(layout, indices):
    eye = torch.eye(8).to_sparse(layout=layout)

    assert measure_step(eye.clone).peak.activations == 8 * indices + floats(8)


class Wrapper(torch.Tensor):
    """Holds a tensor, and works on a copy of it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Wrapper(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = args[0].inner
        return cls(func(inner if func is torch.ops.aten.detach.default else inner.clone()))


def test_wrapper_counts_the_tensors_inside():
    x = Wrapper(torch.ones(64)).requires_grad_()

    memory = measure_step(x.exp)

    assert memory.peak.activations == 2 * floats(64)  # the copy and the result
    assert memory.saved.activations == floats(64)  # the result


def test_fake_tensors_are_measured_as_real_ones():
    with FakeTensorMode():
        model, x = mlp(), torch.randn(16, 64)

        memory = measure_step(lambda: model(x).sum().backward(), model=model)

    assert memory.peak.activations == 3 * floats(16, 128) + LOSS + SEED


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_higher_order_operator_counts_its_results():
    q = torch.randn(1, 1, 16, 8)

    memory = measure_step(lambda: flex_attention(q, q, q))

    assert memory.peak.activations >= floats(1, 1, 16, 8)


def test_replay_state_is_summed_over_modules():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    model[0].replay_state_bytes = 16
    model[1].replay_state_bytes = 5000

    assert measure_step(lambda: model(torch.ones(1)), model=model).replay_state == 5016


def test_only_the_given_device_counts():
    weight = torch.zeros(64, 64, requires_grad=True)

    def step() -> None:
        torch.zeros(16, device="meta")
        STEPS["fork"](weight)

    assert measure_step(step).peak.activations == 2 * floats(64, 64) + LOSS + SEED
    assert measure_step(step, device="meta").peak.activations == floats(16)


def test_device_is_that_of_the_model():
    with torch.device("meta"):
        model, x = mlp(), torch.empty(16, 64)

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    assert memory.peak.activations == 3 * floats(16, 128) + LOSS + SEED


# The measured step is the step


def allocated_peak(step) -> int:
    """Returns the most bytes that the CPU's allocator had handed out at once during `step`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


class AddsInPython(torch.autograd.Function):
    """`weight * a`, whose backward adds two gradients, into memory of its own."""

    @staticmethod
    def forward(ctx, weight, a, b):
        ctx.save_for_backward(a, b)
        return weight * a

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        gradient = dy * a
        other = dy * b
        gradient = gradient + other
        return gradient, None, None


class KeepsGradients(torch.autograd.Function):
    """`weight * a`, whose backward keeps what it returns; and returns more than is needed."""

    @staticmethod
    def forward(ctx, weight, a, kept, more):
        ctx.a, ctx.kept, ctx.more = a, kept, more
        return weight * a

    @staticmethod
    def backward(ctx, dy):
        ctx.kept.append(dy * ctx.a)
        return ctx.kept[-1], dy * ctx.a if ctx.more else None, None, None


def fork_of_kept(weight: torch.Tensor, *, more: bool) -> None:
    kept = []
    sum(KeepsGradients.apply(weight, A, kept, more).sum() for _ in range(2)).backward()


A, B = torch.ones(2, 64, 64).unbind()

STEPS = {
    "fork": lambda w: ((w * A).sum() + (w * B).sum()).backward(),
    "fork-of-expanded": lambda w: (w.sum().exp() + w.sum().sin()).backward(),
    "fork-of-kept": lambda w: fork_of_kept(w, more=False),
    "fork-of-kept-and-more": lambda w: fork_of_kept(w, more=True),
    "sum-in-python": lambda w: AddsInPython.apply(w, A, B).sum().backward(),
    "shared-weight": lambda w: (A @ w @ w @ w).tanh().sum().backward(),
    "residual": lambda w: (w.tanh() + (w.tanh() @ w).relu()).exp().sum().backward(),
    "checkpoint": lambda w: (
        checkpoint(
            lambda h: (h @ w).tanh().exp(), B @ w, use_reentrant=False, preserve_rng_state=False
        )
        .sum()
        .backward()
    ),
    "rebuild": lambda w: Rebuild.apply(A, w, w, w).sum().backward(),
    "accumulate": lambda w: [(w * A).sum().backward() for _ in range(2)],
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_peak_is_what_the_allocator_handed_out_without_measuring(step):
    weight = nn.Parameter(torch.randn(64, 64))

    memory = measure_step(lambda: step(weight), model=nn.ParameterList([weight]))
    weight.grad = None

    assert memory.peak.total - floats(64, 64) == allocated_peak(lambda: step(weight))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mlp(), (16, 64)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (2, 3, 16, 16)),
        (nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)), (4, 64)),
    ],
    ids=["mlp", "convolutions", "layer-norm"],
)
def test_total_agrees_with_pytorch_s_tracker(model, shape):
    x = torch.randn(shape)
    tracker = MemTracker()
    tracker.track_external(model, x)
    with tracker:
        model(x).sum().backward()
    model.zero_grad()

    memory = measure_step(lambda: model(x).sum().backward(), model=model)

    theirs = tracker.get_tracker_snapshot("peak")[x.device]
    assert memory.peak.total == theirs["Total"] - x.nbytes


def test_in_place_change_of_a_saved_tensor_still_raises():
    weight = torch.ones(4, requires_grad=True)

    def step() -> None:
        y = weight.exp()
        y.add_(1)
        y.sum().backward()

    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is at version 1"):
        measure_step(step)


def test_gradients_are_stolen_as_without_measuring():
    weight = nn.Parameter(torch.ones(64))
    addresses = []

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, dy):
            gradient = torch.ones(64)
            addresses.append(gradient.data_ptr())
            return gradient

    measure_step(lambda: Made.apply(weight).backward(), model=nn.ParameterList([weight]))

    assert addresses == [weight.grad.data_ptr()]


def test_step_runs_once_with_its_effects(x):
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    steps = []

    def step(model: nn.Module) -> None:
        steps.append(model)
        F.dropout(model(x)).sum().backward()

    torch.manual_seed(1)
    step(twin)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    measure_step(lambda: step(model), model=model)

    assert len(steps) == 2
    assert torch.equal(torch.get_rng_state(), after)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_step_that_raises_leaves_no_trace(x):
    model = mlp()
    resize = torch.UntypedStorage.resize_

    def step() -> None:
        model(x).sum().backward()
        raise KeyError("the step's own")

    with pytest.raises(KeyError, match="the step's own"):
        measure_step(step, model=model)

    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.UntypedStorage.resize_ is resize
    assert gc.isenabled()


def test_compiled_module_is_measured_in_eager_and_stays_compiled(x):
    model = mlp()
    compiled_runs = []

    def backend(graph, inputs):
        def run(*inputs):
            compiled_runs.append(len(inputs))
            return graph(*inputs)

        return run

    compiled = torch.compile(model, backend=backend)

    memory = measure_step(lambda: compiled(x).sum().backward(), model=model)
    assert memory.peak.activations == 3 * floats(16, 128) + LOSS + SEED
    assert not compiled_runs

    compiled(x)
    assert compiled_runs


def test_graph_that_outlives_the_step_still_works(x):
    model = mlp()
    kept = []

    measure_step(lambda: kept.append(model(x).sum()), model=model)
    gc.collect()

    assert not any(type(thing) is Tracker for thing in gc.get_objects())
    kept.pop().backward()
    assert all(p.grad is not None for p in model.parameters())


# Determinism


def test_equal_in_every_run(x):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.dropout(model(x)).sum().backward()
        optimizer.step()

    measure_step(step, model=model, optimizer=optimizer)  # the state appears

    first, second = (measure_step(step, model=model, optimizer=optimizer) for _ in range(2))

    assert first == second


def test_no_garbage_is_collected_at_a_chance_moment():
    def step() -> None:
        for _ in range(2000):
            cycle = [torch.zeros(64)]
            cycle.append(cycle)

    assert measure_step(step).peak.activations == 2000 * floats(64)


@pytest.mark.slow
def test_first_run_of_a_process_is_no_exception():
    script = """
import torch
from revlib.memory import measure_step

weight = torch.nn.Parameter(torch.zeros(1))

def work():
    tensor = torch.zeros(1024)
    torch.optim.SGD([weight])  # imports much on the first call

def step():
    work()
    work()

print(*(measure_step(step).peak.activations for _ in range(2)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )

    assert result.stdout.split() == [str(floats(1024))] * 2


# Without gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_composite_operations_count_their_inner_tensors(mode):
    a, b, c = torch.randn(16, 64), torch.randn(64, 4), torch.randn(4, 8)

    def step() -> torch.Tensor:
        with mode():
            return torch.linalg.multi_dot([a, b, c])

    # The product of the first two, which is the cheaper order, and the result.
    assert measure_step(step).peak.activations == floats(16, 4) + floats(16, 8)


# At the door


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": None}, "step to be a function that runs one step.*got NoneType"),
        ({"step": dict, "model": [mlp()]}, "model to be a torch Module or None; got list"),
        ({"step": dict, "optimizer": mlp()}, "optimizer to be a torch Optimizer or None; got Seq"),
    ],
    ids=["step", "model", "optimizer"],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        measure_step(**arguments)


def test_table_is_in_mib():
    mib = 2**20
    memory = StepMemory(
        peak=MemorySplit(26 * mib, 3 * mib, 2 * mib, 6 * mib, 37 * mib),
        saved=MemorySplit(4 * mib, mib, 0, 0, 5 * mib),
        replay_state=mib // 2,
    )

    assert (
        str(memory)
        == """\
MiB                   peak      saved
activations          26.00       4.00
parameters            3.00       1.00
gradients             2.00       0.00
optimizer state       6.00       0.00
total                37.00       5.00
replay state                     0.50"""
    )


def test_cuda_peak_is_the_allocator_s(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    model = mlp().to(device)
    x = torch.randn(16, 64, device=device)
    step = lambda: model(x).sum().backward()  # noqa: E731
    step()
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    allocated = torch.cuda.max_memory_allocated() - before
    model.zero_grad()

    memory = measure_step(step, model=model)

    assert memory.peak.total == allocated + MLP_WEIGHTS
    assert memory.peak.activations >= 3 * floats(16, 128) + LOSS + SEED
