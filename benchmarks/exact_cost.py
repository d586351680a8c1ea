"""What exact arithmetic and the drift guard cost: time and memory of a step, each in turn.

Run:    make bench-exact DATA=cifar10.npz
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import couplings, flow_stacks
from revlib import ReversibleSequential
from revlib.benchmarking import measure
from revlib.guard import Guard
from revlib.streams import Streams

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
    benchmark.extra_info["the guard's share of a step"] = f"{share_of_guard(chain, step):.2%}"


class TimedGuard(Guard):
    """A guard that notes how long it takes."""

    seconds = 0.0

    def sample(self, streams: Streams, *, starts: bool) -> Tensor | None:
        return self._timed(super().sample, streams, starts=starts)

    def compare(self, label: str, kept: Tensor, rebuilt: Streams, *, exact: bool) -> None:
        self._timed(super().compare, label, kept, rebuilt, exact=exact)

    def _timed(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        before, start = self.seconds, time.perf_counter()
        result = method(*args, **options)
        self.seconds = before + time.perf_counter() - start  # which counts what is inside once
        return result


def share_of_guard(chain: ReversibleSequential, step: Callable[[], None]) -> float:
    """Returns what part of a step the guard takes: the median of 50 steps."""
    chain._guard = TimedGuard()
    shares = []
    for _ in range(50):
        chain._guard.seconds, start = 0.0, time.perf_counter()
        step()
        shares.append(chain._guard.seconds / (time.perf_counter() - start))
    return statistics.median(shares)
