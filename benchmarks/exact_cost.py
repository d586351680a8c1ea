"""What exact arithmetic and the drift guard cost: time and memory of a step, each in turn.

Run:    make bench-exact DATA=cifar10.npz
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks import couplings, flow_stacks
from revlib import ReversibleSequential
from revlib.benchmarking import measure

DEPTHS = {"couplings": 8, "Glow steps": 8}
METHODS = {
    f"{arithmetic}, {policy}": {"exact": arithmetic == "exact", "policy": policy}
    for policy in ("store", "rebuild")
    for arithmetic in ("float", "exact")
}


def without_guard(chain: ReversibleSequential) -> ReversibleSequential:
    """Keeps no values to compare with."""
    chain._guard.sample = lambda streams, *, starts: None
    return chain


def stack_of(
    kind: str, depth: int, device: torch.device, batch: int = 16, **options: object
) -> tuple[nn.Module, Callable[[], None]]:
    """Returns a stack of the kind, with its training step."""
    torch.manual_seed(0)
    if kind == "couplings":
        blocks = couplings.make_blocks(depth, device)
        x = couplings.make_input(device)[:batch].detach().requires_grad_()
        chain = ReversibleSequential(*blocks, **options)
        return chain, couplings.training_step(chain, x)
    chain = flow_stacks.glow_stack(depth, **options).to(device)
    return chain, flow_stacks.training_step(chain, flow_stacks.make_input(device, batch))


@pytest.fixture
def size(quick) -> dict[str, int]:
    return {"batch": 1} if quick else {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="exact arithmetic, stack of 8 couplings")
def bench_couplings(benchmark, method, size, rounds, device):
    compare(benchmark, "couplings", method, size, rounds, device)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="exact arithmetic, stack of 8 Glow steps")
def bench_glow_steps(benchmark, method, size, rounds, device):
    compare(benchmark, "Glow steps", method, size, rounds, device)


def compare(
    benchmark: object,
    kind: str,
    method: str,
    size: dict[str, int],
    rounds: int,
    device: torch.device,
) -> None:
    steps = {
        name: stack_of(kind, DEPTHS[kind], device, **size, **METHODS[name]) for name in METHODS
    }
    chain, step = steps[method]
    policy = METHODS[method]["policy"]
    against = {name: steps[name][1] for name in ("float, store", f"float, {policy}")}
    for _, other in steps.values():
        other()
    measure(benchmark, step, model=chain, against=against, rounds=rounds)


@pytest.mark.parametrize("kind", DEPTHS)
@pytest.mark.benchmark(group="drift guard, time of a step with it over one without")
def bench_guard(benchmark, kind, size, rounds, device):
    """The sizes are small, for what the guard takes does not grow with them."""
    batch = min(2, size.get("batch", 2))
    chain, step = stack_of(kind, 4, device, batch=batch)
    bare, bare_step = stack_of(kind, 4, device, batch=batch)
    without_guard(bare)
    measure(
        benchmark,
        step,
        model=chain,
        against={"without a guard": bare_step},
        rounds=20 * rounds if rounds > 1 else 1,
    )
    assert chain.rebuild_error is not None and bare.rebuild_error is None
