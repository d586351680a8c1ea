"""How many bytes each op moves: as a kernel, in plain PyTorch, and at the least.

Kernels run in Triton's interpreter, which knows what every program loads and stores: a byte
counts once for each program that reads it, and once for each that writes it, since what one
program touches again comes from a cache. Ops of PyTorch, around the kernels and in plain
PyTorch, read all their inputs and write all their outputs.

Run:    python -m benchmarks.kernel_bytes
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from unittest import mock

# Before Triton and revlib are imported, which read it: kernels run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

import revlib
from benchmarks.kernel_cases import CASES, Case, Traffic
from benchmarks.kernel_forms import Forms
from benchmarks.reporting import markdown_table

DTYPES = (torch.float32, torch.bfloat16)
# A sample of several tiles, so that what is kept of each tile shows as little as it does in use.
BATCH, SIDE = 1, 16

CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class Bytes:
    """Per element of a call's first tensor; `kernel` is None if the op has no kernel."""

    kernel: float | None
    eager: float
    minimum: float


class TrafficWithin(Traffic):
    """Looks into the ops of revlib, and counts what the kernels in there load and store."""

    def __init__(self) -> None:
        super().__init__()
        self.in_kernel = False
        self.touched: dict[tuple, list[numpy.ndarray]] = defaultdict(list)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.in_kernel:
            return op(*args, **kwargs or {})
        if op.namespace == "revlib":
            with self:
                return op.redispatch(CPU_KERNELS, *args, **kwargs or {})
        return super().__torch_dispatch__(op, types, args, kwargs)

    def count(self, call: Callable[[], object]) -> int:
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        launch = InterpretedFunction.run

        def counted_load(builder, pointers, mask, *rest):
            self.touch("load", builder, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            self.touch("store", builder, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def counted_launch(kernel, *args, **kwargs):
            self.in_kernel = True
            launch(kernel, *args, **kwargs)
            self.in_kernel = False
            self.add_touched()

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
            mock.patch.object(InterpretedFunction, "run", counted_launch),
            self,
        ):
            call()
        return self.bytes

    def touch(
        self, kind: str, builder: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle
    ) -> None:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = numpy.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        self.touched[kind, builder.grid_idx, itemsize].append(addresses)

    def add_touched(self) -> None:
        for (_, _, itemsize), addresses in self.touched.items():
            self.bytes += itemsize * len(numpy.unique(numpy.concatenate(addresses)))
        self.touched.clear()


def bytes_moved(case: Case, dtype: torch.dtype, batch: int = BATCH) -> Bytes:
    forms = Forms(case, case.inputs(batch, SIDE, dtype, torch.device("cpu")))
    kernel = TrafficWithin().count(forms.kernel) if case.has_kernel else None
    with Traffic() as eager:
        forms.eager()
    with revlib.use_kernels(False):
        minimum = case.minimum_bytes(forms.inputs, forms.op(*forms.inputs))
    n = forms.inputs[0].numel()
    return Bytes(None if kernel is None else kernel / n, eager.bytes / n, minimum / n)


def table(cases: Iterable[Case]) -> str:
    """Markdown, one line per call."""
    forms = ("kernel", "eager", "minimum")
    columns = [f"{form}, {dtype}".replace("torch.", "") for dtype in DTYPES for form in forms]
    lines = []
    for case in cases:
        moved = [bytes_moved(case, dtype) for dtype in DTYPES]
        numbers = [number for of_dtype in moved for number in astuple(of_dtype)]
        lines.append([case.name, *("" if n is None else f"{n:.1f}" for n in numbers)])
    return markdown_table(["bytes per element", *columns], lines)


if __name__ == "__main__":
    # The interpreter's NumPy warns of infinities where a GPU does not.
    with numpy.errstate(all="ignore"):
        print(table(CASES))
