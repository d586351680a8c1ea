"""Measures every fused op, and whole steps with kernels on and off, on a GPU.

Each op is held against a copy on the device, against plain PyTorch and against torch.compile of
it. Results are written after every measurement: what fails takes nothing else with it.

Run:    make gpu-bench, or this alone: python -m benchmarks.kernels_on_gpu runs/gpu-bench
Dry:    TRITON_INTERPRET=1 python -m benchmarks.kernels_on_gpu runs/dry --device cpu
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

import revlib
from benchmarks.kernel_cases import CASES, Case, Traffic
from benchmarks.kernel_forms import Forms, with_kernels
from benchmarks.kernel_report import OP_HEADER, OpFigures, Results, StepFigures, op_line, step_line
from benchmarks.kernel_steps import STEPS
from benchmarks.kernel_timing import (
    copy_of,
    device_seconds,
    host_seconds,
    in_turn,
    peak_bytes,
    synchronize,
)
from revlib.memory import MIB

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scale:
    """How large and how often things are."""

    mib: tuple[int, ...]
    least_batch: int
    side: int
    rounds: int
    step_rounds: int
    compiler: str
    small_steps: bool


# The cache of an H200 has 50 MiB. The largest size comes first, then the steps, then the others.
GPU = Scale((1024, 512, 256), 1, 32, 25, 10, "inductor", small_steps=False)
# On a CPU it shows that everything runs, and nothing else.
DRY = Scale((0,), 4, 2, 1, 2, "eager", small_steps=True)

# Compiling takes longer than measuring, but does not have to be done by one process.
WARMING_PROCESSES = 12
WARMING_SHARE = 0.4  # of the time there is, at the most


@dataclass(frozen=True)
class Job:
    case: Case
    dtype: torch.dtype
    mib: int

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.dtype}, {self.mib} MiB".replace("torch.", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything failed, and 0 otherwise."""
    given = parse(arguments)
    device = torch.device(given.device)
    scale = DRY if device == CPU else GPU
    jobs = [
        Job(case, dtype, mib)
        for mib in scale.mib
        for dtype in DTYPES
        for case in CASES
        if given.only in case.name
    ]
    if given.warm:
        part, parts = map(int, given.warm.split("/"))
        warm(jobs[part - 1 :: parts], scale, device)
        return 0

    given.out.mkdir(parents=True, exist_ok=True)
    name = "dry run" if device == CPU else torch.cuda.get_device_name(device)
    path = given.out / f"{slug(name)}-{date.today()}-kernels.json"
    started = given.resume or time.time()
    deadline = started + 60 * given.minutes
    if given.resume:
        results = Results.read(path)
    else:
        results = Results(made_by(device))
        if device != CPU:
            warm_in_processes(given, started + WARMING_SHARE * 60 * given.minutes)

    print(" | ".join(OP_HEADER))
    for name, measure in measurements(jobs, scale, device, given.only, results):
        if name in results.done:
            continue
        if time.time() > deadline:
            results.left_out.append(name)
            continue
        torch.manual_seed(0)
        try:
            measure()
        except Exception as error:
            results.fail(name, error)
        results.write(path)
        if is_lost(device):
            go_on_in_a_new_process(given, started)

    results.write(path)
    missing = sum(bool(op.missed) for op in results.ops)
    print(
        f"{len(results.ops)} calls, of which {missing} miss a target; {len(results.steps)} steps"
    )
    print(f"{len(results.failed)} failed; {len(results.left_out)} left out, for want of time")
    print(f"wrote {path} and {path.with_suffix('.md').name}")
    return 1 if results.failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--minutes", type=float, default=8, help="nothing is begun after these")
    parser.add_argument("--only", default="", help="a part of the names of what is measured")
    parser.add_argument("--warm", metavar="K/N", help="compile the k-th of n parts, and end")
    parser.add_argument("--resume", metavar="START", type=float, help="go on with a run's results")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and given.out.resolve().is_relative_to(ROOT / "benchmarks"):
        parser.error(f"a dry run has no results to keep; got {given.out}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (given.device == "cpu"):
        parser.error("TRITON_INTERPRET must be 1 for a dry run, and 0 on a GPU")
    return given


def measurements(
    jobs: Sequence[Job], scale: Scale, device: torch.device, only: str, results: Results
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to do, by names, in order."""
    first = [job for job in jobs if job.mib == scale.mib[0]]
    for job in first:
        yield job.name, lambda job=job: measure_op(job, scale, device, results)
    for name in STEPS:
        if only in name:
            yield name, lambda name=name: measure_step(name, scale, device, results)
    for job in jobs[len(first) :]:
        yield job.name, lambda job=job: measure_op(job, scale, device, results)


def measure_op(job: Job, scale: Scale, device: torch.device, results: Results) -> None:
    case = job.case
    batch, minimum_bytes, eager_bytes = size_up(job, scale)
    inputs = case.inputs(batch, scale.side, job.dtype, device)
    forms = Forms(case, inputs)
    if case.has_kernel:
        forms.check_kernel()

    calls = {"kernel": forms.kernel} if case.has_kernel else {}
    calls["eager"] = forms.eager
    try:
        compiled = forms.compiled(scale.compiler)
        forms.prepare()
        compiled()
    except Exception as error:
        results.fail(f"{job.name}, compiled", error)
    else:
        calls["compiled"] = compiled

    peaks = {}
    for form, call in calls.items():
        forms.prepare()
        peaks[form] = peak_bytes(call, device)
    calls["copy"] = copy_of(minimum_bytes, device)
    seconds = in_turn(calls, device_seconds(device), scale.rounds, forms.prepare)

    figures = OpFigures(
        job.name,
        [list(tensor.shape) for tensor in inputs],
        minimum_bytes,
        eager_bytes,
        {form: statistics.median(times) for form, times in seconds.items()},
        peaks,
    )
    results.ops.append(figures)
    print(" | ".join(op_line(figures)), flush=True)


def measure_step(name: str, scale: Scale, device: torch.device, results: Results) -> None:
    step = STEPS[name](device, small=scale.small_steps)
    steps = {"on": with_kernels(True, step), "off": with_kernels(False, step)}
    seconds = in_turn(steps, host_seconds(device), scale.step_rounds)
    peaks = {switch: peak_bytes(step, device) for switch, step in steps.items()}
    figures = StepFigures(name, seconds, peaks)
    results.steps.append(figures)
    print(" | ".join(step_line(figures)), flush=True)


def size_up(job: Job, scale: Scale) -> tuple[int, int, int]:
    """The batch that moves so many bytes, and the bytes that it and plain PyTorch then move."""
    forms = Forms(job.case, job.case.inputs(1, scale.side, job.dtype, CPU))
    with revlib.use_kernels(False):
        least = job.case.minimum_bytes(forms.inputs, forms.op(*forms.inputs))
    with Traffic() as traffic:
        forms.eager()
    batch = max(scale.least_batch, job.mib * MIB // least)
    return batch, batch * least, batch * traffic.bytes


def warm(jobs: Sequence[Job], scale: Scale, device: torch.device) -> None:
    """Compiles what the jobs need, into the caches on disk."""
    for job in jobs:
        # Whatever fails here fails again where it is measured, and is told there.
        with suppress(Exception):
            batch, *_ = size_up(job, scale)
            forms = Forms(job.case, job.case.inputs(batch, scale.side, job.dtype, device))
            with suppress(Exception):
                forms.compiled(scale.compiler)()
            forms.kernel()
        torch.cuda.empty_cache()


def warm_in_processes(given: argparse.Namespace, deadline: float) -> None:
    n = min(WARMING_PROCESSES, os.cpu_count() or 1)
    # Each is a compiling process already, and needs no pool of its own.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command(given), "--warm", f"{k}/{n}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for k in range(1, n + 1)
    ]
    for process in processes:
        try:
            process.wait(max(0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def command(given: argparse.Namespace) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.kernels_on_gpu", str(given.out)]
    options = {"device": given.device, "minutes": given.minutes, "only": given.only}
    return module + [f"--{name}={value}" for name, value in options.items()]


def is_lost(device: torch.device) -> bool:
    """Whether an error has left the GPU to this process useless, as a wrong address does."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def go_on_in_a_new_process(given: argparse.Namespace, started: float) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [*command(given), f"--resume={started}"])


def made_by(device: torch.device) -> dict[str, str]:
    facts = {
        "command": "python -m benchmarks.kernels_on_gpu",
        "device": "a CPU, in Triton's interpreter: a dry run, whose times are no figures",
        "date": str(date.today()),
        "revlib": revlib.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "seed": "0",
        "commit": commit(),
    }
    if device != CPU:
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.L2_cache_size // MIB} MiB of L2 cache"
    return facts


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.check_output(describe, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.strip()


def slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


if __name__ == "__main__":
    sys.exit(main())
