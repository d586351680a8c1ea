"""Times calls in turn with each other, A B C A B C, and takes the memory of each by itself."""

from collections.abc import Callable, Mapping
from time import perf_counter

import torch
from torch import Tensor

Seconds = Callable[[Callable[[], object]], float]

# Cycles for which the device idles before a call, about half a millisecond: by then the host
# has queued the call's first launches, and stays ahead of the device.
HEAD_START = 1_000_000
FLUSHED_BYTES = 2**28


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    seconds: Seconds,
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times each call once a round, after two rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2 + rounds):
        for name, call in calls.items():
            prepare()
            taken[name].append(seconds(call))
    return {name: times[2:] for name, times in taken.items()}


def device_seconds(device: torch.device) -> Seconds:
    """Times what the device does in a call, from a flushed cache.

    A CPU is timed by `host_seconds`: that shows that calls run, and nothing else.
    """
    if device.type != "cuda":
        return host_seconds(device)
    flushed = torch.ones(FLUSHED_BYTES // 4, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call: Callable[[], object]) -> float:
        flushed.sum()  # read, not written: the call would pay for writing lines back
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return seconds


def host_seconds(device: torch.device) -> Seconds:
    """Times a call as its caller waits for it."""

    def seconds(call: Callable[[], object]) -> float:
        synchronize(device)
        start = perf_counter()
        call()
        synchronize(device)
        return perf_counter() - start

    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_of(n_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy on the device that reads and writes so many bytes in all."""
    source = torch.randint(256, (max(1, n_bytes // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes alive at once beyond those before the call; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
