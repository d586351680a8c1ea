"""Measures the memory of one training step, of any model, to the byte."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import get_args
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from revlib.tracker import Event, Kind, Tracker, unpack

MIB = 2**20


@dataclass(frozen=True)
class MemorySplit:
    """Bytes by what they hold, each figure the maximum of its own over the step.

    Attributes:
        activations: Whatever the step made that is none of the others.
        parameters: Parameters and buffers.
        gradients: Gradients of parameters.
        optimizer_state: What the optimizer keeps from step to step.
        total: The most of all four together, which may be less than their sum.
    """

    activations: int
    parameters: int
    gradients: int
    optimizer_state: int
    total: int


@dataclass(frozen=True)
class StepMemory:
    """The memory of one step in bytes; printed, a table in MiB (2**20 bytes).

    Attributes:
        peak: The most bytes alive at once.
        saved: The most bytes that autograd kept for backward while no backward was running.
        replay_state: What reversible chains kept besides activations, to repeat in backward
            what they did in forward: RNG states and earlier values of buffers.
    """

    peak: MemorySplit
    saved: MemorySplit
    replay_state: int

    def __str__(self) -> str:
        lines = [f"{'MiB':15}{'peak':>11}{'saved':>11}"]
        for name in (field.name for field in fields(MemorySplit)):
            peak, saved = getattr(self.peak, name) / MIB, getattr(self.saved, name) / MIB
            lines.append(f"{name.replace('_', ' '):15}{peak:11.2f}{saved:11.2f}")
        lines.append(f"{'replay state':26}{self.replay_state / MIB:11.2f}")
        return "\n".join(lines)


def measure_step(
    step: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | str | None = None,
) -> StepMemory:
    """Runs `step` once, with the effects of any step, and returns the memory that it took.

    Activations leave out what was alive before the step, such as its input, and include its
    output. A view stands for the whole storage behind it, and a storage counts once. What
    arrives at a parameter's `.grad` is a gradient from its birth, even if it is then added to
    a gradient that is already there.

    On a CPU the figures are bytes of tensors and the same in every run; scratch memory inside
    an operation is not seen. On a CUDA device the peak is the allocator's: what it has beyond
    the tensors (workspaces, rounding) is added to the activations and the total. The first
    step there allocates what CUDA's libraries then keep, so measure a later one.

    Saved bytes are what autograd saves itself: not what a `torch.autograd.Function` hangs on
    its `ctx`, and not what other saved-tensors hooks keep in a tensor's place. Peak bytes see
    both. Modules compiled by `torch.compile` run uncompiled while they are measured; and
    PyTorch lets no step that calls `torch.func.grad` or `vjp` be measured.

    Args:
        step: Does the step: forward, and backward and optimizer if they are to be measured.
        model: The model, whose parameters, buffers and gradients are no activations.
        optimizer: The optimizer, whose parameters, gradients and state are no activations.
        device: Where memory is measured. By default where the first parameter is, or on the
            CPU if there is none.

    Returns:
        The peak and saved bytes, each split by what they hold, and the replay state.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
        >>> x = torch.randn(512, 256)
        >>> from revlib.memory import measure_step
        >>> print(measure_step(lambda: model(x).sum().backward(), model=model))
        MiB                   peak      saved
        activations           6.00       2.00
        parameters            2.00       1.00
        gradients             2.00       0.00
        optimizer state       0.00       0.00
        total                 9.01       3.00
        replay state                     0.00
    """
    _check_arguments(step, model, optimizer)
    modules = [] if model is None else list(model.modules())
    groups = [] if optimizer is None else optimizer.param_groups
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    parameters += [p for group in groups for p in group["params"]]
    if device is None:
        device = parameters[0].device if parameters else "cpu"
    # A tensor's device has an index where the name may have none ("cuda").
    device = torch.empty(0, device=device).device
    tracker = Tracker(device)

    def name_what_lasts() -> None:
        buffers = [b for module in modules for b in module.buffers(recurse=False)]
        tracker.name([parameters, buffers], "parameters")
        tracker.name([p.grad for p in parameters], "gradients")
        tracker.name([] if optimizer is None else optimizer.state, "optimizer_state")

    with ExitStack() as stack:
        # Under a dispatch mode compiled modules run in eager too, but ever after as well. And
        # this imports Dynamo, which many functions do on first use: amid the step the import
        # would leave garbage that holds the frames of its callers, and so their tensors.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_garbage_kept())
        name_what_lasts()
        before = _split(tracker.alive).total
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            allocated_before = torch.cuda.memory_allocated(device)
        for parameter in set(parameters):
            if parameter.requires_grad:
                stack.enter_context(_gradients_named(parameter, tracker))
        # A proxy, for PyTorch keeps the hooks of a graph that no backward runs through for good.
        proxy = weakref.proxy(tracker)
        stack.enter_context(saved_tensors_hooks(lambda tensor: proxy.pack(tensor), unpack))
        stack.enter_context(_resizes_seen(tracker))
        stack.enter_context(tracker)
        step()
        name_what_lasts()

    peak = _split(tracker.alive)
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device) - allocated_before
        unseen = max(0, allocated - (peak.total - before))
        peak = replace(peak, activations=peak.activations + unseen, total=peak.total + unseen)
    replay_state = sum(getattr(module, "replay_state_bytes", 0) for module in modules)
    return StepMemory(peak, _split(tracker.saved), replay_state)


def _split(log: list[Event]) -> MemorySplit:
    """Returns the most bytes of each kind, and of all, at any moment of a log that counts."""
    now = dict.fromkeys((*get_args(Kind), "total"), 0)
    most = dict(now)

    def look() -> None:
        most.update((name, now[name]) for name in now if now[name] > most[name])

    for storage, change, counts in log:
        if counts:
            look()
        if storage.kind is not None:
            now[storage.kind] += change
            now["total"] += change
        if counts:
            look()
    look()
    return MemorySplit(**most)


@contextmanager
def _gradients_named(parameter: nn.Parameter, tracker: Tracker) -> Iterator[None]:
    """Names what arrives at the parameter and what it holds then, which may be a copy.

    A hook on the tensor itself would see the same, but chains treat hooked parameters apart.
    """
    node = get_gradient_edge(parameter).node
    arriving = node.register_prehook(lambda grads: tracker.name(grads, "gradients"))
    held = parameter.register_post_accumulate_grad_hook(
        lambda p: tracker.name(p.grad, "gradients")
    )
    try:
        yield
    finally:
        arriving.remove()
        held.remove()


@contextmanager
def _resizes_seen(tracker: Tracker) -> Iterator[None]:
    """Shows the tracker what no mode sees: storages emptied or filled directly, as by FSDP."""
    original = torch.UntypedStorage.resize_

    def resize(untyped: torch.UntypedStorage, size: int) -> None:
        original(untyped, size)
        tracker.resized(untyped)

    with patch.object(torch.UntypedStorage, "resize_", resize):
        yield


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Keeps the collector out of the step: when it runs depends on all that ran before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_arguments(step: object, model: object, optimizer: object) -> None:
    if not callable(step):
        raise TypeError(
            "measure_step expects step to be a function that runs one step, such as "
            f"`lambda: model(x).sum().backward()`; got {type(step).__name__}"
        )
    for name, value, expected in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
    ):
        if value is not None and not isinstance(value, expected):
            raise TypeError(
                f"measure_step expects {name} to be a torch {expected.__name__} or None; "
                f"got {type(value).__name__}"
            )
