"""The calls that are measured on a GPU: one line per way to call an op of revlib.functional."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revlib import functional

CHANNELS = 16
# Where the ops that have one take their state.
STATES = {"exact_affine_coupling": 2, "exact_actnorm": 3, "exact_channel_map": 7}

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        op: The op's name in `revlib.functional`.
        draw: Draws the tensors that it is called with; see `Draw`.
        options: Its keyword arguments.
        layout: Lays these tensors out in memory.
        with_gradients: Whether it is the op and then its gradients by autograd, and not the op
            alone.
        has_kernel: Whether the op runs as a kernel; otherwise it is plain PyTorch everywhere.
        note: What else its name should tell.
    """

    op: str
    draw: "Draw"
    options: dict[str, Any] = field(default_factory=dict)
    layout: Callable[[Tensors], Tensors] = lambda tensors: tensors
    with_gradients: bool = False
    has_kernel: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        words = [self.op.replace("_", " ")]
        words += [f"{option} {value}" for option, value in self.options.items()]
        if self.layout is not Case.layout:
            words.append(self.layout.__name__.replace("_", " "))
        if self.note:
            words.append(self.note)
        if self.with_gradients:
            words.append("with gradients")
        return ", ".join(words).replace(" True", "")

    @property
    def written(self) -> tuple[int, ...]:
        """Which of its tensors the call writes over."""
        if self.state:
            return (self.state,)
        if not self.options.get("inplace"):
            return ()
        return (0, 2) if self.op.endswith("backward") else (0,)

    @property
    def state(self) -> int:
        """Which of its tensors is a state, written and not returned; 0 for none."""
        return next((at for op, at in STATES.items() if self.op.startswith(op)), 0)

    def call(self) -> Call:
        """Returns the op, from tensors to a tuple of tensors."""
        op = getattr(functional, self.op)

        def call(*tensors: Tensor) -> Tensors:
            outputs = op(*tensors, **self.options)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return call

    def inputs(self, batch: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        normal = partial(torch.randn, device=device)
        return self.layout(self.draw(batch, side, dtype, normal))

    def minimum_bytes(self, inputs: Tensors, outputs: Tensors) -> int:
        """Each input read once and each output written once, in forward and in backward.

        Backward reads the inputs again, and the gradients of the outputs.
        """
        read, written = bytes_of(inputs), bytes_of(outputs)
        if self.state:
            return self.minimum_bytes_with_state(inputs, outputs)
        if self.options.get("mask") == "channel":
            read -= bytes_of(inputs[1:2]) // 2  # what the conditioner says of kept channels
        if not self.with_gradients:
            return read + written
        again = read
        if self.op == "affine_coupling":
            again -= bytes_of(inputs[1:2]) // 2  # no gradient depends on the shift
        return 2 * read + 2 * written + again

    def minimum_bytes_with_state(self, inputs: Tensors, outputs: Tensors) -> int:
        """The state is written, too. The gradients need none of it, and of h the log-scales."""
        forward = bytes_of((*inputs, *outputs, inputs[self.state]))
        if not self.with_gradients:
            return forward
        x, h = inputs[: self.state]
        output_gradients = outputs[:-1]  # the flag has none
        return forward + bytes_of((x, h, x, *output_gradients)) + bytes_of((h,)) // 2


# batch, side of an image, dtype, torch.randn on the device
Draw = Callable[[int, int, torch.dtype, Callable[..., Tensor]], Tensors]


def draw_coupling(batch, side, dtype, normal, *, per_channel=2, gradients=False):
    """A stream and its conditioner's output, and the gradients of the stream and the log_det."""
    stream = (batch, CHANNELS, side, side)
    x = normal(stream, dtype=dtype)
    h = normal((batch, per_channel * CHANNELS, side, side), dtype=dtype)
    if not gradients:
        return x, h
    return x, h, normal(stream, dtype=dtype), normal(batch)


def draw_exact_additive(batch, side, dtype, normal):
    """The stream is float32 in any case: the grid needs it."""
    stream = (batch, CHANNELS, side, side)
    return normal(stream), normal(stream, dtype=dtype)


def draw_exact_coupling(batch, side, dtype, normal, *, gradients=False):
    """The stream and its gradient are float32 in any case, and the stream is on the grid.

    Raw log-scales are whole and small: the S of these is the same however exp is rounded.
    """
    x, h, *more = draw_coupling(batch, side, dtype, normal, gradients=gradients)
    h = h.round().clamp(-3, 3)
    return on_grid(x), h, new_state(x), *(gradient.float() for gradient in more)


def draw_exact_channel_map(batch, side, dtype, normal, *, channels=CHANNELS, stream=torch.float32):
    """The factors of a rotation; the stream is on the grid, and wide enough for it."""
    x = (normal((batch, channels, side, side)) * 2**12).round().to(stream) / 2**12
    permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(normal((channels, channels))).Q)
    diagonal = upper.diagonal()
    factors = lower, upper, diagonal.abs().log(), diagonal.sign(), permutation, normal(channels)
    state = torch.full_like(x, 2**15, dtype=torch.int64)
    return x, *(factor.to(dtype) for factor in factors), state


def draw_stream(batch, side, dtype, normal):
    return (normal((batch, CHANNELS, side, side), dtype=dtype),)


def draw_actnorm(batch, side, dtype, normal):
    (x,) = draw_stream(batch, side, dtype, normal)
    return x, normal(CHANNELS, dtype=dtype), normal(CHANNELS, dtype=dtype)


def draw_actnorm_backward(batch, side, dtype, normal):
    y, log_scale, bias = draw_actnorm(batch, side, dtype, normal)
    return y, log_scale, bias, normal(y.shape, dtype=dtype), normal(batch)


def draw_exact_actnorm(batch, side, dtype, normal):
    x, log_scale, bias = draw_actnorm(batch, side, dtype, normal)
    return on_grid(x), log_scale, bias, new_state(x)


def draw_exact_actnorm_backward(batch, side, dtype, normal):
    y, log_scale, bias, state = draw_exact_actnorm(batch, side, dtype, normal)
    return y, log_scale, bias, state, normal(y.shape), normal(batch)


def on_grid(x: Tensor) -> Tensor:
    return (x.float() * 2**12).round() / 2**12


def new_state(x: Tensor) -> Tensor:
    return torch.full_like(x, 2**15, dtype=torch.int64)


def channels_last(tensors: Tensors) -> Tensors:
    return tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for tensor in tensors
    )


def half_of_a_stream(tensors: Tensors) -> Tensors:
    """The first tensor becomes the second half of one with twice the channels."""
    x, *others = tensors
    return torch.cat((x, x), 1).chunk(2, 1)[1], *others


coupling_gradients = partial(draw_coupling, gradients=True)
exact_coupling_gradients = partial(draw_exact_coupling, gradients=True)


def spline(bins: int, **more: Any) -> Draw:
    return partial(draw_coupling, per_channel=3 * bins - 1, **more)


CASES = (
    Case("affine_coupling", draw_coupling),
    Case("affine_coupling", draw_coupling, layout=channels_last),
    Case("affine_coupling", draw_coupling, {"interleaved": True}),
    Case("affine_coupling", draw_coupling, {"inplace": True}, half_of_a_stream),
    Case("affine_coupling", draw_coupling, with_gradients=True),
    Case("affine_coupling_inverse", draw_coupling),
    Case("affine_coupling_backward", coupling_gradients),
    Case("affine_coupling_backward", coupling_gradients, layout=channels_last),
    Case("affine_coupling_backward", coupling_gradients, {"interleaved": True}),
    Case("affine_coupling_backward", coupling_gradients, {"inplace": True}, half_of_a_stream),
    Case("masked_affine_coupling", draw_coupling, {"mask": "checkerboard"}),
    Case("masked_affine_coupling", draw_coupling, {"mask": "channel"}),
    Case("masked_affine_coupling_backward", coupling_gradients, {"mask": "checkerboard"}),
    Case("masked_affine_coupling_backward", coupling_gradients, {"mask": "channel"}),
    Case("exact_additive_coupling", draw_exact_additive),
    Case("exact_additive_coupling", draw_exact_additive, {"inplace": True}, half_of_a_stream),
    Case("exact_affine_coupling", draw_exact_coupling),
    Case("exact_affine_coupling", draw_exact_coupling, layout=channels_last),
    Case("exact_affine_coupling", draw_exact_coupling, with_gradients=True),
    Case("exact_affine_coupling_inverse", draw_exact_coupling),
    Case("exact_affine_coupling_backward", exact_coupling_gradients),
    Case("exact_channel_map", draw_exact_channel_map),
    Case("exact_channel_map", draw_exact_channel_map, layout=channels_last),
    Case("exact_channel_map_inverse", draw_exact_channel_map),
    Case("spline_coupling", spline(8), {"bins": 8}),
    Case("spline_coupling", spline(8), {"bins": 8}, with_gradients=True),
    Case("spline_coupling_inverse", spline(8), {"bins": 8}),
    Case("spline_coupling_backward", spline(8, gradients=True), {"bins": 8}),
    Case("spline_coupling", spline(32), {"bins": 32}),
    Case("spline_coupling_inverse", spline(32), {"bins": 32}),
    Case("spline_coupling_backward", spline(32, gradients=True), {"bins": 32}),
    Case("gaussian_log_prob", draw_stream, note="standard"),
    Case("gaussian_log_prob", draw_coupling),
    Case("gaussian_log_prob", draw_coupling, with_gradients=True),
    Case("actnorm", draw_actnorm, has_kernel=False),
    Case("actnorm", draw_actnorm, with_gradients=True),
    Case("actnorm_backward", draw_actnorm_backward),
    Case("actnorm_backward", draw_actnorm_backward, layout=channels_last),
    Case("exact_actnorm", draw_exact_actnorm),
    Case("exact_actnorm_inverse", draw_exact_actnorm),
    Case("exact_actnorm_backward", draw_exact_actnorm_backward),
    Case("exact_actnorm_backward", draw_exact_actnorm_backward, layout=channels_last),
    Case("squeeze", draw_stream, has_kernel=False),
    Case("unsqueeze", draw_stream, has_kernel=False),
)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes behind tensors; an element that is expanded counts once."""
    return sum(
        tensor.itemsize
        * math.prod(
            size
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            if stride or not size
        )
        for tensor in tensors
    )


class Traffic(TorchDispatchMode):
    """Names the ops that run, and counts the bytes of their tensors: each op is a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.ops: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.add(op.name())
        result = op(*args, **kwargs or {})
        read, written = tensors_in((args, kwargs)), tensors_in(result)
        name = op.overloadpacket.__name__
        if name.startswith(("new_", "empty")) or name.endswith("_like"):
            read = []  # but for its shape
        if name == "copy_":
            read = read[1:]  # the destination is only written
        memory = {tensor.untyped_storage().data_ptr() for tensor in read}
        is_view = not op._schema.is_mutable and any(
            tensor.untyped_storage().data_ptr() in memory for tensor in written
        )
        if not is_view and "empty" not in name:
            self.bytes += bytes_of(read) + bytes_of(written)
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
