"""The same call of an op in three forms: as a kernel, in plain PyTorch, and compiled from that."""

from collections.abc import Callable

import torch
from torch import Tensor

import revlib
from benchmarks.kernel_cases import Call, Case, Tensors, Traffic


class Forms:
    """One case on given inputs; a form takes nothing and returns what the op does.

    Plain PyTorch is what the op runs with kernels turned off, and so is what is compiled.
    """

    def __init__(self, case: Case, inputs: Tensors) -> None:
        self.case, self.inputs, self.op = case, inputs, case.call()
        self.pristine = {index: inputs[index].clone() for index in case.written}
        self.output_gradients: Tensors = ()
        if case.with_gradients:
            with revlib.use_kernels(False):
                outputs = filter(torch.is_floating_point, self.op(*inputs))
                self.output_gradients = tuple(map(torch.randn_like, outputs))
            self.prepare()
        self.kernel = with_kernels(True, self.call(self.op, inputs))
        self.eager = with_kernels(False, self.call(self.op, inputs))

    def prepare(self) -> None:
        """Undoes what an op in place has written."""
        for index, tensor in self.pristine.items():
            self.inputs[index].copy_(tensor)

    def compiled(self, compiler: str) -> Callable[[], Tensors]:
        torch.compiler.reset()
        op = torch.compile(self.op, dynamic=False, backend=compiler)
        return with_kernels(False, self.call(op, self.inputs))

    def call(self, op: Call, inputs: Tensors) -> Callable[[], Tensors]:
        if not self.case.with_gradients:
            return lambda: op(*inputs)
        tensors = [tensor.detach() for tensor in inputs]
        leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
        gradients = [
            gradient.to(torch.promote_types(gradient.dtype, inputs[0].dtype))
            for gradient in self.output_gradients
        ]

        def forward_and_backward() -> Tensors:
            outputs = op(*tensors)
            differentiable = [output for output in outputs if output.requires_grad]
            return *outputs, *torch.autograd.grad(differentiable, leaves, gradients)

        return forward_and_backward

    def check_kernel(self) -> None:
        """Raises unless the kernel is right: see `kernel_report.METHOD`."""

        def result(call: Callable[[], Tensors]) -> Tensors:
            self.prepare()
            return tuple(output.detach().clone() for output in call())

        with Traffic() as traffic:
            got = result(self.kernel)
        if not any(name.startswith("revlib::") for name in traffic.ops):
            raise ValueError("no kernel ran")
        eager = result(self.eager)
        self.prepare()
        doubles = tuple(
            tensor.double() if tensor.is_floating_point() else tensor for tensor in self.inputs
        )
        exact = result(with_kernels(False, self.call(self.op, doubles)))
        for place, (fused, near, want) in enumerate(zip(got, eager, exact, strict=True)):
            error, allowed = errors(fused, near, want)
            if not error <= allowed:
                raise ValueError(f"output {place} is off by {error:.1e}, allowed {allowed:.1e}")


def errors(got: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """The norm of the error, and what is allowed for it."""
    if not exact.is_floating_point():
        return (got != exact).sum().item(), 0
    unit = torch.finfo(eager.dtype).eps * exact.norm().item()
    return (got - exact).norm().item(), 2 * (eager - exact).norm().item() + unit


def with_kernels(on: bool, call: Callable[[], object]) -> Callable[[], object]:
    def switched() -> object:
        with revlib.use_kernels(on):
            return call()

    return switched
