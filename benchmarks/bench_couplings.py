"""Memory and time of a training step of a stack of couplings, against its depth.

Run:    make bench
"""

import pytest
import torch
import torch._functorch.config
from torch import nn

from benchmarks.couplings import METHODS, count_evaluations, make_blocks, make_input, training_step
from revlib.benchmarking import measure

DEPTHS = [4, 8, 16, 32]

# How much of the activations torch.compile may keep, as a share of what it likes to keep.
BUDGETS = {"compile, budget 0.5": 0.5, "compile, budget 0.1": 0.1}


def rounds(depth: int) -> int:
    return max(5, 64 // depth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="stack of couplings")
def bench_training_step(benchmark, method, depth, device):
    blocks, x = make_blocks(depth, device), make_input(device)
    model = METHODS[method](*blocks)
    step = training_step(model, x)
    against = {"store": training_step(METHODS["store"](*blocks), x)}
    if method == "rebuild, store last quarter":  # which peaks below this one
        per_block = METHODS["checkpoint per block"](*blocks)
        against["checkpoint per block"] = training_step(per_block, x)

    benchmark.extra_info["evaluations of f"] = count_evaluations(step, blocks)
    measure(benchmark, step, model=model, against=against, rounds=rounds(depth))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.benchmark(group="stack of couplings")
@pytest.mark.filterwarnings("default")  # the compiler's advice is no failure
def bench_compiled_step(benchmark, method, depth, device, monkeypatch):
    if device.type != "cuda":
        pytest.skip("compiled steps are measured on a GPU")
    torch.compiler.reset()
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", BUDGETS[method])
    blocks, x = make_blocks(depth, device), make_input(device)
    model = torch.compile(nn.Sequential(*blocks))
    step = training_step(model, x)

    stored = training_step(nn.Sequential(*blocks), x)

    measure(benchmark, step, model=model, against={"store": stored}, rounds=rounds(depth))

    # A compiled model is measured uncompiled, so this figure is the allocator's. The gradients
    # that are there at the peak count in it.
    model.zero_grad()
    x.grad = None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    benchmark.extra_info["peak_bytes"]["activations"] = (
        torch.cuda.max_memory_allocated(device) - before
    )
    del benchmark.extra_info["saved_bytes"]
