"""Records the memory of a training step beside the time that pytest-benchmark takes of it.

Measuring memory slows a step down, so each has a pass of its own. A second step can be timed
in turn with the first, A B A B: what disturbs the machine then disturbs both, and their ratio
stays. `python -m revlib.report` turns the JSON of such benchmarks into tables and pictures.
"""

from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

import revlib
from revlib.memory import measure_step

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def measure(
    benchmark: "BenchmarkFixture",
    step: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    against: tuple[str, Callable[[], object]] | None = None,
    rounds: int = 10,
) -> None:
    """Measures the memory of `step` and then times it, all under pytest-benchmark.

    What it finds goes to `benchmark.extra_info`: `peak_bytes` and `saved_bytes`, each split as
    :class:`revlib.memory.MemorySplit` is; `replay_state_bytes`; the device, threads, seed and
    versions; and with `against` its name and the `time_ratios`, one for each round.

    Args:
        benchmark: pytest-benchmark's fixture.
        step: Does the step: forward, backward and, if it is to be measured, the optimizer.
        model: The model, whose parameters, buffers and gradients are no activations.
        optimizer: The optimizer, whose state is no activations.
        against: The name and the step of what `step` is compared with: it runs before each
            round of `step`, and is timed too.
        rounds: How often `step` is timed, after one round that is not.

    Example:
        A file `bench_mine.py`, for `pytest bench_mine.py --benchmark-json=mine.json` and then
        `python -m revlib.report mine.json`::

            from revlib.benchmarking import measure

            def test_step(benchmark):
                model, x = MyModel(), torch.randn(16, 3, 32, 32)
                measure(benchmark, lambda: model(x).sum().backward(), model=model)
    """
    parameters = model.parameters() if model else ()
    device = next((p.device for p in parameters), torch.device("cpu"))
    step()  # what the first step alone does, such as loading libraries, is in neither figure
    memory = measure_step(step, model=model, optimizer=optimizer)

    seconds: list[float] = []
    seconds_against: list[float] = []
    benchmark.pedantic(
        _timed(step, device, seconds),
        setup=_timed(against[1], device, seconds_against) if against else None,
        rounds=rounds,
        warmup_rounds=1,
    )
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        seed=torch.initial_seed(),
        torch=torch.__version__,
        revlib=revlib.__version__,
        peak_bytes=asdict(memory.peak),
        saved_bytes=asdict(memory.saved),
        replay_state_bytes=memory.replay_state,
    )
    if against:
        ratios = [b / a for a, b in zip(seconds_against, seconds, strict=True)]
        benchmark.extra_info.update(against=against[0], time_ratios=ratios[-rounds:])


def _timed(
    step: Callable[[], object], device: torch.device, seconds: list[float]
) -> Callable[[], None]:
    def timed() -> None:
        start = perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)

    return timed
