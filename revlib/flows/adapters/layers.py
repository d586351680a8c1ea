"""Layers that run the modules of other libraries, whatever these call their directions.

An adapter holds the user's own module, so that parameters, state dict and sub-modules are shared.
What differs between libraries comes in as functions of that module. They belong to no instance:
copies of an adapter then use their own copy of the module.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revlib.evaluate import Evaluate, Replay
from revlib.flows.layer import FlowLayer, zeros
from revlib.replay import Slot, parts_of, rng_set, rng_states, tensors_set
from revlib.streams import Streams

# Runs a module in a direction of its own: run(module, x, context, inverse) returns the result and
# the log_det.
Run = Callable[[nn.Module, Tensor, Tensor | None, bool], tuple[Tensor, Any]]


class Called(FlowLayer):
    """Calls a module whole: three evaluations in a step that rebuilds, and those not in autocast.

    Args:
        module: The user's module.
        run: Runs it.
        flip: Whether its own forward direction goes from latent to data.
        cheap_inverse: Whether a chain may rebuild it, in either direction.
    """

    on_streams = False

    def __init__(
        self, module: nn.Module, run: Run, *, flip: bool = False, cheap_inverse: bool = True
    ) -> None:
        super().__init__()
        self.module = module
        self.flip = flip
        self.cheap_inverse = self.cheap_forward = cheap_inverse
        self._run = run

    @property
    def stands_for(self) -> nn.Module:
        return self.module

    @property
    def contract(self) -> type[FlowLayer]:
        return type(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.call(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.call(z, context, inverse=True)

    def call(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        # What a short float would round away could not be rebuilt.
        with nullcontext() if not self.cheap_inverse else without_autocast(x):
            y, log_det = self._run(self.module, x, context, inverse != self.flip)
        return y, per_sample(log_det, x)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        initialize(self, self, *streams, evaluate.context)
        return super().forward_streams(streams, evaluate)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        initialize(self, self.inverse, *streams, evaluate.context)
        return super().inverse_streams(streams, evaluate)


class Steps(FlowLayer):
    """Runs several layers that share one module.

    Args:
        module: The user's module. It is registered here alone, so it is once in a state dict.
        steps: The layers, from data to latent.
    """

    def __init__(self, module: nn.Module, steps: Sequence[FlowLayer]) -> None:
        super().__init__()
        self.module = module
        self._steps = tuple(steps)
        self.can_be_exact = all(step.can_be_exact for step in steps)
        for step in steps:
            step.can_be_exact = self.can_be_exact

    @property
    def stands_for(self) -> nn.Module:
        return self.module

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        log_dets = []
        for step in self._steps:
            *streams, log_det = step.forward_streams(tuple(streams), evaluate)
            log_dets.append(log_det)
        return *streams, sum(log_dets)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        log_dets = []
        for step in self._steps[::-1]:
            *streams, log_det = step.inverse_streams(tuple(streams), evaluate)
            log_dets.append(log_det)
        return *streams, sum(log_dets)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        *gradients, dlog_det = gradients
        for step in self._steps[::-1]:
            gradients = (*gradients, dlog_det)
            outputs, gradients = step.backward_streams(outputs, gradients, evaluate)
        return outputs, gradients

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        *gradients, dlog_det = gradients
        for step in self._steps:
            gradients = (*gradients, dlog_det)
            outputs, gradients = step.inverse_backward_streams(outputs, gradients, evaluate)
        return outputs, gradients


class Part(nn.Module):
    """Stands for a part of what a layer computes: two of the same part are equal.

    Args:
        layer: The layer, which is not registered: an evaluation keeps the state of all modules
            that it is registered to use, and must use no others.
    """

    def __init__(self, layer: FlowLayer, *key: object) -> None:
        super().__init__()
        self._key = (layer, *key)

    @property
    def stands_for(self) -> nn.Module:
        return self._key[0]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._key == self._key

    def __hash__(self) -> int:
        return hash((type(self), *self._key))


def stand_in(module: nn.Module, **attributes: object) -> nn.Module:
    """Returns a shallow copy of a module that has other attributes."""
    copy = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, **attributes}
    return copy


def initialize(
    module: nn.Module, run: Callable[..., object], x: Tensor, context: Tensor | None
) -> None:
    """Lets the ActNorm layers of normflows see the first batch before it is recorded.

    They tell by a buffer whether they saw it, so an evaluation that is repeated as it was would
    set their parameters again. This one leaves no other trace.
    """
    if torch.compiler.is_compiling():  # a trace cannot ask whether they saw it
        return
    flag = "data_dep_init_done"
    buffers = [Slot(p._buffers, *item) for p in parts_of(module) for item in p._buffers.items()]
    if any(slot.key == flag and not slot.tensor for slot in buffers):
        others = [slot for slot in buffers if slot.key != flag and slot.tensor is not None]
        args = (x,) if context is None else (x, context)
        with (
            torch.no_grad(),
            rng_set(x.device, rng_states(x.device)),
            tensors_set([(slot, slot.tensor.clone()) for slot in others]),
        ):
            run(*args)


def on_copy(
    run: Run, module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Any]:
    """Runs a module that writes to what it is given."""
    return run(module, x.clone(), context, inverse)


def without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def per_sample(log_det: Tensor | float, x: Tensor) -> Tensor:
    """Returns a log_det as [batch], where a library gives one number for all samples."""
    return zeros(x) + torch.as_tensor(log_det, device=x.device)
