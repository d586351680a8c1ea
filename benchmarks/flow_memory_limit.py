"""A Glow that cannot be trained in a limited memory when stored, and can when rebuilt.

Each policy trains in a process of its own. Once that has loaded its libraries, the system (on a
GPU, PyTorch's allocator) refuses it more than the allowance on top of what it has by then.

Run:    make bench-flows DATA=cifar10.npz
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.flow_images import batches, read_pictures
from revlib import flows
from revlib.memory import MIB, measure_step

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Plan:
    """What is trained, on how much, and the MiB that are allowed for it."""

    size: int = 32
    levels: int = 2
    steps: int = 16
    hidden: int = 64
    n_train: int = 2_000
    batch: int = 32
    iterations: int = 30
    lr: float = 1e-4
    allowance: int = 64


QUICK = Plan(steps=8, n_train=64, batch=32, iterations=9, allowance=40)


@dataclass
class Outcome:
    """The bits/dim of every step that was done, and why no more were done, if they were not."""

    bits_per_dim: list[float]
    error: str | None = None


def build(plan: Plan, policy: str, device: torch.device) -> flows.Flow:
    torch.manual_seed(0)
    shape = (3, plan.size, plan.size)
    return flows.glow(
        shape,
        levels=plan.levels,
        steps=plan.steps,
        hidden=plan.hidden,
        policy=policy,
    ).to(device)


def limit_memory(device: torch.device, allowance: int) -> None:
    """Allows this process so many bytes more than it has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = torch.cuda.memory_reserved(device) + allowance
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + allowance
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def is_out_of_memory(error: BaseException) -> bool:
    refused = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return refused or "can't allocate memory" in str(error)


def train(plan: Plan, policy: str, path: Path, device: torch.device) -> Outcome:
    """Trains under the limit, which holds for the rest of this process."""
    pixels = read_pictures(path, plan.size, plan.n_train, 0).train
    x, *rest = batches(pixels, plan.batch, plan.iterations, torch.Generator().manual_seed(0))
    flow = build(plan, policy, device)
    optimizer = torch.optim.Adam(flow.parameters(), plan.lr)
    with torch.no_grad():
        flow.nll(x.to(device))  # which sets the activation norms
    flow.nll(x[:1].to(device)).backward()  # which loads the libraries
    limit_memory(device, plan.allowance * MIB)

    outcome = Outcome([])
    try:
        for batch in (x, *rest):
            optimizer.zero_grad()
            loss = flow.bits_per_dim(batch.to(device)) + 8
            loss.backward()
            optimizer.step()
            outcome.bits_per_dim.append(loss.item())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        outcome.error = f"out of memory in step {len(outcome.bits_per_dim) + 1}"
    return outcome


def train_apart(quick: bool, policy: str, path: Path, device: torch.device) -> Outcome:
    """Trains in another process, so that the limit is that one's."""
    command = [sys.executable, "-m", "benchmarks.flow_memory_limit", policy, str(path.resolve())]
    command += ["--device", str(device), *(["--quick"] if quick else [])]
    # Without the word of conftest.py to run kernels in Triton's interpreter, which is slow.
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{policy} ended with status {done.returncode}: {done.stderr[-500:]}")
    return Outcome(**json.loads(done.stdout))


@pytest.mark.parametrize("policy", ["store", "rebuild"])
@pytest.mark.benchmark(group="Glow in limited memory")
def bench_memory_limit(benchmark, policy, quick, data, device):
    plan = QUICK if quick else Plan()
    flow = build(plan, policy, device)
    x = torch.rand(plan.batch, 3, plan.size, plan.size, device=device)
    flow.nll(x)
    memory = measure_step(lambda: flow.nll(x).backward(), model=flow)

    outcome = benchmark.pedantic(train_apart, args=(quick, policy, data, device))

    bits = outcome.bits_per_dim
    third = -(-len(bits) // 3)
    benchmark.extra_info.update(
        {
            "allowed, MiB": plan.allowance,
            "activations, MiB": memory.peak.activations / MIB,
            "outcome": outcome.error or f"trained {len(bits)} steps",
            "bits/dim, first third of the steps": statistics.mean(bits[:third])
            if bits
            else "none",
            "bits/dim, last third of the steps": statistics.mean(bits[-third:])
            if bits
            else "none",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("policy", choices=["store", "rebuild"])
    parser.add_argument("data", type=Path, help="an .npz file of images, as Keras writes them")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    torch.set_num_threads(1)
    print(json.dumps(vars(train(plan, options.policy, options.data, options.device))))


if __name__ == "__main__":
    main()
