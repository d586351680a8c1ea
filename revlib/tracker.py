"""Logs the memory behind every tensor of a step, and says afterwards what it was for.

The trick is to decide last. While the step runs, a dispatch mode logs when the storage behind
each tensor appears and when it goes; what it was for is settled by what it became. A gradient
that a custom Function returns is a tensor like any other until, perhaps much later, it reaches
its parameter; it then counts as a gradient from its birth.

PyTorch's `torch.distributed._tools.mem_tracker.MemTracker` sees the same tensors, and the
tests hold our totals against its. It is no base for this: it labels tensors as they come, so
that gradients in flight are "temporary"; keeps the split at the overall peak only; counts
views of an input that it was not told of; and raises when a model runs twice.
"""

import sys
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)

Kind = Literal["activations", "parameters", "gradients", "optimizer_state"]

# The tensors that a sparse tensor consists of, by its layout.
_SPARSE_PARTS = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


@dataclass(eq=False, slots=True)
class Storage:
    """A storage seen in the step.

    Attributes:
        kind: What it is for; None for what the caller had before the step.
        nbytes: Its size when it was last seen.
        holders: How many saved tensors hold it.
        addends: The storages of the two gradients that autograd added to make it.
    """

    kind: Kind | None
    nbytes: int = 0
    holders: int = 0
    addends: tuple["Storage", ...] = ()


class Event(NamedTuple):
    """One entry of a log.

    Attributes:
        storage: What appeared, went or changed its size.
        change: By how many bytes.
        counts: Whether the bytes just before and just after count for a maximum.
    """

    storage: Storage
    change: int
    counts: bool = True


class Tracker(TorchDispatchMode):
    """Logs the storages on one device while it is entered.

    Args:
        device: The device.

    Attributes:
        alive: The log of the storages that are alive.
        saved: The log of those that autograd keeps for backward. What it keeps counts while
            no backward is running: graphs that live and die in one are not kept for it.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.alive: list[Event] = []
        self.saved: list[Event] = []
        self._device = device
        self._known: dict[int, tuple[Storage, weakref.ref]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise __torch_dispatch__ is wrapped and cannot see who called it.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # the operations on the tensors inside come here next
        if isinstance(func, OpOverload) and func.namespace != "prim":
            with self:
                parts = func.decompose(*args, **kwargs)  # inference mode leaves this to us
            if parts is not NotImplemented:
                return parts

        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor, torch.from_numpy
        inputs = self.see((args, kwargs), "activations" if fresh else None)
        result = func(*args, **kwargs)
        outputs = self.see(result, "activations")
        if func is torch.ops.aten.add.Tensor and _autograd_called(sys._getframe()):
            for storage in outputs:
                storage.addends = tuple(inputs)
        return result

    def see(self, values: object, kind: Kind | None) -> list[Storage]:
        """Logs and returns the storages of the tensors in `values`; new ones are of `kind`."""
        return [
            self._see(untyped, kind)
            for tensor in _tensors(values)
            if tensor.device == self._device
            for untyped in _storages(tensor)
        ]

    def resized(self, untyped: torch.UntypedStorage) -> None:
        """Logs the new size of a storage."""
        if untyped.device == self._device:
            self._see(untyped, None)

    def name(self, values: object, kind: Kind) -> None:
        """Says what the tensors in `values` are for, unless it is known."""
        storages = self.see(values, kind)
        while storages:
            storage = storages.pop()
            if storage.kind == "activations":
                storage.kind = kind
                storages += storage.addends

    def pack(self, tensor: Tensor) -> "Saved":
        """The hook for tensors that autograd saves."""
        storages = self.see(tensor, None)
        for storage in storages:
            storage.holders += 1
            if storage.holders == 1:
                self._log_saved(storage, storage.nbytes)
        return Saved(tensor, tensor._version, storages, weakref.ref(self))

    def let_go(self, storages: list[Storage]) -> None:
        """Logs that autograd has let go of a tensor that it saved."""
        for storage in storages:
            storage.holders -= 1
            if storage.holders == 0:
                self._log_saved(storage, -storage.nbytes)

    def _see(self, untyped: torch.UntypedStorage, kind: Kind | None) -> Storage:
        key = untyped._cdata
        if key not in self._known:
            self._known[key] = Storage(kind), weakref.ref(untyped, lambda _: self._freed(key))
        storage, _ = self._known[key]
        if change := untyped.nbytes() - storage.nbytes:
            storage.nbytes += change
            self.alive.append(Event(storage, change))
            if storage.holders:
                self._log_saved(storage, change)
        return storage

    def _freed(self, key: int) -> None:
        storage, _ = self._known.pop(key)
        latest = self.alive[-1].storage
        # Where paths meet, autograd adds one gradient to another in place if nothing else holds
        # it; but not while a dispatch mode is on. So log an addend freed at once as if it was.
        in_place = storage in latest.addends and storage.nbytes == latest.nbytes
        self.alive.insert(len(self.alive) - in_place, Event(storage, -storage.nbytes))

    def _log_saved(self, storage: Storage, change: int) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        self.saved.append(Event(storage, change, counts=not in_backward))


@dataclass(eq=False, slots=True)
class Saved:
    """What autograd holds in place of a tensor that it saved."""

    tensor: Tensor
    version: int
    storages: list[Storage]
    tracker: weakref.ref[Tracker]

    def __del__(self) -> None:
        if tracker := self.tracker():
            tracker.let_go(self.storages)


def unpack(saved: Saved) -> Tensor:
    """The hook for tensors that autograd wants back; makes the check that hooks switch off."""
    tensor = saved.tensor
    if tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
            f"{tensor._version}; expected version {saved.version} instead"
        )
    return tensor


def _autograd_called(frame: FrameType) -> bool:
    """Returns whether a function was called by autograd's engine and not from Python code."""
    # For a GPU the engine has a thread of its own, where the function has no caller.
    return frame.f_back is None or frame.f_back.f_code is _engine_run_backward.__code__


def _tensors(values: object) -> list[Tensor]:
    """Returns the tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Returns the storages behind a tensor: several if it is made of other tensors."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    elif tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    else:
        parts = [part(tensor) for part in _SPARSE_PARTS.get(tensor.layout, ())]
    return [storage for part in parts for storage in _storages(part)]
