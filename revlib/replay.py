"""What makes the second evaluation of a sub-network equal the first.

Backward evaluates every sub-network once more. That evaluation draws the same random
numbers, runs under the same autocast and train/eval modes, and sees the parameters and
buffers that the first one saw. It leaves no trace: the module's own buffers and the global
RNG state stay as the forward pass left them.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import _has_any_global_hook

# In training these update their running statistics but normalise by the batch's own: a
# second evaluation needs scratch buffers to write to, and no earlier values to read.
_WRITE_STATISTICS_ONLY = {_BatchNorm.forward, _InstanceNorm.forward, SyncBatchNorm.forward}


def writes_statistics_only(part: nn.Module) -> bool:
    """Tells whether calling `part` now would write its buffers without reading them."""
    return part.training and type(part).forward in _WRITE_STATISTICS_ONLY


def is_altered(module: nn.Module) -> bool:
    """Tells whether calling this very module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
        or "inverse" in module.__dict__
    )


# Classes whose modules draw no random numbers, with their forward methods. Subclasses may draw.
_DRAW_NOTHING = {
    cls: cls.forward
    for cls in (
        *(nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softmax, nn.Hardtanh, nn.Hardswish),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    )
}


def draws_nothing(cls: type[nn.Module]) -> type[nn.Module]:
    """Says of a class, and not of those derived from it, that it draws no random numbers."""
    _DRAW_NOTHING[cls] = cls.forward
    return cls


def may_draw(parts: list[nn.Module]) -> bool:
    """Tells whether an evaluation of these might draw random numbers.

    Asking the generator instead takes as long as a small operation.
    """
    return _has_any_global_hook() or not all(map(_is_as_its_class_says, parts))


def _is_as_its_class_says(part: nn.Module) -> bool:
    cls = type(part)
    return (
        cls in _DRAW_NOTHING
        and _DRAW_NOTHING[cls] is cls.forward
        and not is_altered(part)
        and "_conv_forward" not in part.__dict__
        and all(type(p) in (nn.Parameter, Tensor, NoneType) for p in part._parameters.values())
    )


class Slot(NamedTuple):
    """A place in a module for a parameter or buffer, and the tensor that it held, if any."""

    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor | None

    def is_untouched(self) -> bool:
        """Tells whether the place still holds the same tensor."""
        return self.holder.get(self.key) is self.tensor


class Evaluation(NamedTuple):
    """What one evaluation of one sub-network used; kept until backward replays it.

    There is one for each sub-network in every step, and Python's garbage collector looks at all
    that these hold. So parameters are in one tuple, without the places that they come from.

    Attributes:
        module: The sub-network.
        parts: The module and each of its descendants.
        modes: `training` of each part.
        parameters: The parameters it was evaluated with, None included, part after part.
        constants: The buffers that it left as they were.
        priors: The buffers that it changed, with copies of what they held before.
        scratch: The buffers that it wrote without reading them.
        rng: The RNG states it started from, or None where it drew nothing.
        layouts: Those of the streams it was given: a kernel may round otherwise on others.
    """

    module: nn.Module
    parts: list[nn.Module]
    modes: list[bool]
    parameters: tuple[Tensor | None, ...]
    constants: list[Slot]
    priors: list[Slot]
    scratch: list[Slot]
    rng: tuple[Tensor, ...] | None
    layouts: list[tuple[int, ...] | None]

    @property
    def state_bytes(self) -> int:
        """The bytes of replay state: RNG states and prior values of buffers."""
        states = {slot.tensor for slot in self.priors} - {None} | {*(self.rng or ())}
        return sum(state.nbytes for state in states)


@dataclass(frozen=True)
class Autocast:
    """The autocast state that both evaluations run under."""

    states: tuple[tuple[str, torch.dtype, bool], ...]
    cache_enabled: bool

    @classmethod
    def current(cls, device: torch.device) -> "Autocast":
        """Returns the state in force for the CPU and for `device`."""
        return cls(
            tuple(
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in sorted({"cpu", device.type})
                if torch.amp.is_autocast_available(kind)
            ),
            torch.is_autocast_cache_enabled(),
        )

    def is_off(self) -> bool:
        """Tells whether autocast was off, and is off now."""
        return not any(on or torch.is_autocast_enabled(kind) for kind, _, on in self.states)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the state in force for a second evaluation."""
        # The cache holds low-precision copies of weights, each with its place in a graph. Where
        # backward runs inside an autocast region, copies of the first evaluation are in it.
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            for kind, dtype, enabled in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype, enabled, cache_enabled=self.cache_enabled)
                    )
            yield


def in_backward() -> bool:
    """Tells whether this thread is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


def autocast_is_on(device: torch.device) -> bool:
    """Tells whether autocast is in force for operations on `device`."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def forget_casts(device: torch.device) -> None:
    """Has autocast cast weights anew.

    The gradients of all uses of a cast that is kept are summed in half precision. Blocks that are
    rebuilt cast weights anew, each for itself.
    """
    if torch.is_grad_enabled() and autocast_is_on(device):
        torch.clear_autocast_cache()


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """Keeps autocast from touching operations on `device`, for a while."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def saved_tensors_hooks_off() -> AbstractContextManager[None]:
    """Keeps hooks on saved tensors from those of a graph that no backward will run through."""
    hooks = []
    while pair := torch._C._autograd._top_saved_tensors_default_hooks(False):
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    return _hooks_put_back(hooks) if hooks else nullcontext()


@contextmanager
def _hooks_put_back(hooks: list[tuple[Callable, Callable]]) -> Iterator[None]:
    try:
        yield
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Returns what `module.modules()` yields, several times as fast: it runs in every step."""
    found: dict[nn.Module, None] = {}
    pending = [module]
    while pending:
        part = pending.pop()
        if part is not None and part not in found:
            found[part] = None
            pending.extend(reversed(part._modules.values()))
    return list(found)


@contextmanager
def tensors_set(substitutes: list[tuple[Slot, Tensor]]) -> Iterator[None]:
    """Puts tensors in places, for a while: a `functional_call` that need not search by name."""
    now = [slot.holder[slot.key] for slot, _ in substitutes]
    for slot, tensor in substitutes:
        slot.holder[slot.key] = tensor
    try:
        yield
    finally:
        for (slot, _), tensor in zip(substitutes, now, strict=True):
            slot.holder[slot.key] = tensor


@contextmanager
def modes_set(parts: list[nn.Module], modes: list[bool]) -> Iterator[None]:
    """Sets `training` of each part, for a while."""
    now = [part.training for part in parts]
    for part, mode in zip(parts, modes, strict=True):
        part.training = mode
    try:
        yield
    finally:
        for part, mode in zip(parts, now, strict=True):
            part.training = mode


def rng_states(device: torch.device) -> tuple[Tensor, ...]:
    """Returns the RNG states of the CPU and, where it is another, of `device`."""
    states = (torch.get_rng_state(),)
    if device.type == "mps":
        states += (torch.mps.get_rng_state(),)
    elif device.type not in ("cpu", "meta"):
        states += (torch.get_device_module(device).get_rng_state(device),)
    return states


def differ(a: Tensor, b: Tensor) -> bool:
    """Tells whether two RNG states differ."""
    # Raw bytes, because torch.equal would go through whatever dispatch mode is on, and under
    # FakeTensorMode there is nothing to compare.
    return ctypes.string_at(a.data_ptr(), a.nbytes) != ctypes.string_at(b.data_ptr(), b.nbytes)


def _set_rng_states(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    elif len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def rng_set(device: torch.device, states: tuple[Tensor, ...] | None) -> Iterator[None]:
    """Sets the RNG states that `rng_states` returned, for a while; None leaves them alone."""
    if states is None:
        yield
        return
    now = rng_states(device)
    _set_rng_states(device, states)
    try:
        yield
    finally:
        _set_rng_states(device, now)
