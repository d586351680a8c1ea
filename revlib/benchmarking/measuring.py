"""Records the memory of a training step beside the time that pytest-benchmark takes of it.

Measuring memory slows a step down, so each has a pass of its own. A second step can be timed
in turn with the first, A B A B: what disturbs the machine then disturbs both, and their ratio
stays.
"""

from collections.abc import Callable, Mapping
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
    against: Mapping[str, Callable[[], object]] | None = None,
    rounds: int = 10,
) -> None:
    """Measures the memory of `step` and then times it, all under pytest-benchmark.

    What it finds goes to `benchmark.extra_info`: `peak_bytes` and `saved_bytes`, each split as
    :class:`revlib.memory.MemorySplit` is; `replay_state_bytes`; the device, threads, seed and
    versions; and for each step in `against` the `time_ratios`, one for each round.

    Args:
        benchmark: pytest-benchmark's fixture.
        step: Does the step: forward, backward and, if it is to be measured, the optimizer.
        model: The model, whose parameters, buffers and gradients are no activations, and whose
            device is measured.
        optimizer: The optimizer, whose state is no activations.
        against: Steps that `step` is compared with, by their names: all of them run before each
            round of `step`, and are timed too.
        rounds: How often `step` is timed, after one round that is not.

    Example:
        A file `bench_mine.py`, for `pytest bench_mine.py --benchmark-json=mine.json` and then
        `python -m revlib.benchmarking mine.json`::

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
    seconds_of: dict[str, list[float]] = {name: [] for name in against or {}}
    others = [_timed(against[name], device, taken) for name, taken in seconds_of.items()]

    def run_others() -> None:
        for run in others:
            run()

    benchmark.pedantic(
        _timed(step, device, seconds), setup=run_others, rounds=rounds, warmup_rounds=1
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
        time_ratios={
            name: [ours / theirs for ours, theirs in zip(seconds, taken, strict=True)][-rounds:]
            for name, taken in seconds_of.items()
        },
    )


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
