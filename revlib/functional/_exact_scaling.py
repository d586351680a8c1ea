"""What ops that scale bit for bit check: the stream, the state, the grid, and double backward."""

import torch
from torch import Tensor

from revlib.functional._checks import (
    check_batch_and_channels,
    check_integer,
    check_shape,
    has_memory_of_its_own,
)
from revlib.grid import LARGEST_SCALING_BITS


def check_exact_stream(op: str, name: str, stream: Tensor, state: Tensor, bits: int) -> None:
    if stream.dtype not in LARGEST_SCALING_BITS:
        raise TypeError(f"{op}: {name} must be float32 or float64; got {stream.dtype}")
    check_batch_and_channels(op, name, stream)
    check_integer(op, "bits", bits, 0, LARGEST_SCALING_BITS[stream.dtype])
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: state must be a tensor; got {type(state).__name__}")
    if state.dtype != torch.int64:
        raise TypeError(f"{op}: state must be int64; got {state.dtype}")
    check_shape(op, "state", state, stream.shape, f"shaped like {name}")
    if state.device != stream.device:
        raise ValueError(
            f"{op}: state must be on the device of {name}, {stream.device}; got {state.device}"
        )
    # Strides that are symbols, as in a graph that is being compiled, cannot be sorted.
    if not torch.compiler.is_compiling() and not has_memory_of_its_own(state):
        raise ValueError(
            f"{op}: state is written, so its elements need memory of their own; "
            f"got the sizes {list(state.shape)} with the strides {state.stride()}"
        )


def check_differentiated_once(op: str, inverse: bool) -> None:
    """For the start of a backward pass, in which gradients are on where a graph of it is made."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}{'_inverse' * inverse} cannot be differentiated twice (create_graph=True); "
            "build the chain with exact=False"
        )
