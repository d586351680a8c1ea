"""Compiles the kernels for GPUs that are not there, and reads what came of it.

Every call is made as users make it, on a CPU, and what its launchers launch is compiled as it
would be for a launch, and not run: nobody keeps a list of the kernels' arguments.

Run:    python -m tests.kernels.ahead --instructions
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernel_cases import (
    CASES,
    Case,
    coupling_gradients,
    draw_coupling,
    draw_exact_channel_map,
    spline,
)
from benchmarks.kernel_forms import Forms
from revlib import dispatch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16)

# A sample of many tiles, and sizes and strides that 16 divides, but for the batch.
BATCH, SIDE = 2, 32
PROCESSES = 2

CALLS = (
    *(case for case in CASES if case.has_kernel),
    *(
        Case(op, draw, {"scale": scale})
        for scale in ("exp", "sigmoid", "atan")
        for op, draw in (
            ("affine_coupling", draw_coupling),
            ("affine_coupling_backward", coupling_gradients),
        )
    ),
    Case("affine_coupling_inverse_backward", coupling_gradients),
    Case("masked_affine_coupling_inverse", draw_coupling, {"mask": "checkerboard"}),
    Case("masked_affine_coupling_inverse_backward", coupling_gradients, {"mask": "checkerboard"}),
    *(
        Case(
            op,
            partial(draw_exact_channel_map, channels=channels, stream=stream),
            note=f"{channels} channels of {stream}",
        )
        for op in ("exact_channel_map", "exact_channel_map_inverse")
        for channels, stream in ((64, torch.float32), (16, torch.float64), (64, torch.float64))
    ),
    Case("spline_coupling_inverse_backward", spline(8, gradients=True), {"bins": 8}),
)


@dataclass(frozen=True)
class Figures:
    """What a compiler made of one launch.

    Attributes:
        call: The call of an op that launched it, by its name.
        dtype: The dtype of the call's tensors.
        kernel: The kernel's name.
        target: The GPU that it was compiled for.
        hints: Whether the compiler was told which addresses and integers 16 divides.
        registers: Of one thread.
        instructions: Of one thread, from a listing; 0 if they were not counted.
        spills: What lies in memory for want of registers: bytes of a thread (NVIDIA), or how many
            registers (AMD).
        scalar_spills: Scalar registers whose values lie in vector registers, not in memory (AMD).
        wide: Instructions that load or store 128 bits of global memory.
        others: Those that load or store less.
        wide_needed: How many wide ones move every tensor once that has 128 bits for each thread.
    """

    call: str
    dtype: str
    kernel: str
    target: str
    hints: bool
    registers: int
    instructions: int
    spills: int
    scalar_spills: int
    wide: int
    others: int
    wide_needed: int


@dataclass(frozen=True)
class Launch:
    compiled: CompiledKernel
    n_programs: int
    tensor_bytes: tuple[int, ...]


class AbsentGPU:
    """All that Triton asks of a driver to compile a kernel."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_launches(target: GPUTarget, hints: bool) -> Iterator[list[Launch]]:
    """Within it, kernels take CPU tensors, and a launch compiles and does nothing else."""
    launches = []
    run = JITFunction.run

    def compile_launch(kernel: JITFunction, *args, grid, warmup, **kwargs):
        unhinted = [param.name for param in kernel.params if not (hints or param.is_constexpr)]
        # A kernel anew: it remembers what it was compiled for by the device, and not the target.
        kernel = triton.jit(kernel.fn, do_not_specialize_on_alignment=unhinted)
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        launches.append(Launch(compiled, math.prod(grid), tuple(t.nbytes for t in tensors)))

    with (
        mock.patch.object(JITFunction, "run", compile_launch),
        mock.patch.object(dispatch, "_device_types", ("cpu",)),
    ):
        driver.set_active(AbsentGPU(target))
        yield launches


def figures_of_call(index: int, dtype: torch.dtype, count_instructions: bool) -> list[Figures]:
    """Without hints in float32 alone: other dtypes differ in how wide the accesses are."""
    case = CALLS[index]
    forms = Forms(case, case.inputs(BATCH, SIDE, dtype, torch.device("cpu")))
    found = []
    for name, target in TARGETS.items():
        for hints in (True, False) if dtype == torch.float32 else (True,):
            with compiled_launches(target, hints) as launches:
                forms.kernel()
            found += [
                Figures(
                    case.name,
                    str(dtype).removeprefix("torch."),
                    launch.compiled.metadata.name,
                    name,
                    hints,
                    *code_figures(launch.compiled, count_instructions),
                    wide_needed(launch),
                )
                for launch in launches
            ]
    return found


def code_figures(compiled: CompiledKernel, count_instructions: bool) -> tuple[int, ...]:
    """The figures from `registers` to `others`."""
    if compiled.metadata.target.backend == "hip":
        code = compiled.asm["amdgcn"]
        usage = dict(re.findall(r"\.(\w+_count):\s*(\d+)", code))
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        accesses = re.findall(r"\b(?:buffer|global|flat)_(?:load|store)_(\w+)", code)
        registers, spills, scalar_spills = (int(usage[name]) for name in names)
        listed = r"^\s+[sv]_|^\s+(?:buffer|global|flat|ds)_"
        instructions = len(re.findall(listed, code, re.MULTILINE)) if count_instructions else 0
        return registers, instructions, spills, scalar_spills, *wide_and_others(accesses)

    usage = resource_usage(compiled.asm["cubin"])
    accesses = re.findall(r"\b(?:ld|st)\.global\.(\S+)", compiled.asm["ptx"])
    instructions = 0
    if count_instructions:
        listing = cuobjdump(compiled.asm["cubin"], "--dump-sass")
        instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", listing))
    spills = usage["STACK"] + usage["LOCAL"]
    return usage["REG"], instructions, spills, 0, *wide_and_others(accesses)


def wide_and_others(accesses: list[str]) -> tuple[int, int]:
    n_wide = sum(access.endswith(("v4.b32", "v2.b64", "dwordx4")) for access in accesses)
    return n_wide, len(accesses) - n_wide


def resource_usage(cubin: bytes) -> dict[str, int]:
    _, _, function = cuobjdump(cubin, "--dump-resource-usage").partition(" Function ")
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", function)}


def cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wide_needed(launch: Launch) -> int:
    metadata = launch.compiled.metadata
    n_threads = launch.n_programs * metadata.num_warps * metadata.target.warp_size
    return sum(nbytes // (16 * n_threads) for nbytes in launch.tensor_bytes)


def all_figures(count_instructions: bool) -> list[Figures]:
    jobs = [(index, dtype, count_instructions) for index in range(len(CALLS)) for dtype in DTYPES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        found = pool.map(figures_of_call, *zip(*jobs, strict=True))
        return [figures for of_call in found for figures in of_call]


def table(rows: Iterable[Figures]) -> str:
    lines = [[field.name.replace("_", " ") for field in fields(Figures)]]
    lines += [[str(value) for value in astuple(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="a file for the figures, instead of a table")
    parser.add_argument(
        "--instructions", action="store_true", help="count them, in ten times the time"
    )
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter compiles nothing: TRITON_INTERPRET must not be 1")

    found = all_figures(given.instructions)
    if given.json:
        given.json.write_text(json.dumps([asdict(figures) for figures in found]))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
