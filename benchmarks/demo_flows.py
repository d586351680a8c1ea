"""The flows of the demo: the density of two moons, and a Glow of handwritten digits.

Both are trained by `revlib.train`, which draws the pictures. Memory is counted to the byte, for
Glows of two depths, with their activations rebuilt and stored.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table
from torch.distributions import MultivariateNormal

from benchmarks.reporting import environment
from benchmarks.twins import progress_bars
from revlib import flows
from revlib.memory import MIB, measure_step
from revlib.train import DensityProgress, DensityResult, Settings, load_samples, train

TITLE = "Normalizing flows of two moons and of the same digits"
MOONS = Settings(
    data="two_moons", out=Path("moons"), model="spline_flow", flow_steps=4, hidden=32, lr=3e-3,
    epochs=8,
)  # fmt: skip
DIGITS = Settings(
    data="digits", out=Path("digits"), model="glow", levels=2, flow_steps=4, hidden=32, lr=3e-3,
    epochs=25, batch_size=64,
)  # fmt: skip
DEPTHS = (4, 16)
POLICIES = ("rebuild", "store")


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Args:
        moons: What the flow of two moons has come to.
        gaussian_nll: In nats, of held-out points under a Gaussian fitted to the others.
        digits: What the Glow has come to.
        uniform_bits_per_dim: Of digits under the uniform distribution of pixel values.
        peak_bytes: Peak activation bytes of a forward and backward pass of the Glow, by policy
            and by the number of steps per level.
    """

    moons: DensityResult
    gaussian_nll: float
    digits: DensityResult
    uniform_bits_per_dim: float
    peak_bytes: Mapping[str, Mapping[int, int]]


def demo(console: Console, folder: Path, runs: Path) -> list[Path]:
    """Trains and measures, and prints the figures.

    Args:
        console: Where to print.
        folder: Where the pictures and the figures are written.
        runs: A folder for the runs.

    Returns:
        The files that were written.
    """
    console.print(TITLE + "\n", style="bold")
    moons, digits = (replace(each, out=runs / each.out) for each in (MOONS, DIGITS))
    with progress_bars(console) as progress:
        outcome = Outcome(
            moons=train_flow(moons, progress),
            gaussian_nll=gaussian_nll(moons.data),
            digits=train_flow(digits, progress),
            uniform_bits_per_dim=math.log2(load_samples(digits.data).levels),
            peak_bytes=measure_memory(digits, progress),
        )
    console.print(result_table(outcome))

    pictures = {"moons.png": ("moons", "density"), "digits.png": ("digits", "samples")}
    for name, (run, kind) in pictures.items():
        (drawn,) = (runs / run / "pictures").glob(f"{kind}-*.png")
        shutil.copy(drawn, folder / name)
    record = {"title": TITLE, "made_by": {"command": "make demo", **environment()}}
    record |= dataclasses.asdict(outcome)
    (folder / "flows.json").write_text(json.dumps(record, indent=2) + "\n")
    return [folder / name for name in (*pictures, "flows.json")]


def train_flow(settings: Settings, progress: bars.Progress) -> DensityResult:
    bar = progress.add_task(settings.out.name, total=1, now="")

    def show(state: DensityProgress) -> None:
        bits = state.bits_per_dim
        now = f"{state.nll:.3f} nats" if bits is None else f"{bits:.3f} bits/dim"
        progress.update(bar, completed=state.step / state.steps, now=f"{settings.model}: {now}")

    return train(settings, on_progress=show)


def gaussian_nll(data: str) -> float:
    samples = load_samples(data)
    gaussian = MultivariateNormal(samples.x_train.mean(0), samples.x_train.T.cov())
    return -gaussian.log_prob(samples.x_test).mean().item()


def measure_memory(settings: Settings, progress: bars.Progress) -> dict[str, dict[int, int]]:
    samples = load_samples(settings.data)
    x = samples.x_train[: settings.batch_size]
    bar = progress.add_task("memory", total=len(POLICIES) * len(DEPTHS), now="")

    def peak_bytes(policy: str, steps: int) -> int:
        flow = flows.glow(
            samples.shape,
            levels=settings.levels,
            steps=steps,
            hidden=settings.hidden,
            dequantize=samples.levels,
            policy=policy,
        )
        flow.nll(x)  # The first batch starts ActNorm.
        progress.advance(bar)
        return measure_step(lambda: flow.nll(x).backward(), model=flow).peak.activations

    return {policy: {steps: peak_bytes(policy, steps) for steps in DEPTHS} for policy in POLICIES}


def result_table(outcome: Outcome) -> Table:
    """Lays the figures out for a terminal of 80 columns or more."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("flow", justify="right", no_wrap=True, style="bold")
    table.add_column("beside it", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    moons, digits = outcome.moons.test_nll, outcome.digits.test_bits_per_dim
    table.add_row(
        "two moons, nats per point", f"{moons:.3f}", f"{outcome.gaussian_nll:.3f}", "a Gaussian"
    )
    table.add_row(
        "digits, bits/dim", f"{digits:.3f}", f"{outcome.uniform_bits_per_dim:.3f}", "uniform"
    )
    table.add_row("peak activations of the Glow, MiB", "", "", "")
    rebuilt, stored = (outcome.peak_bytes[policy] for policy in POLICIES)
    for steps in DEPTHS:
        peaks = (f"{each[steps] / MIB:.2f}" for each in (rebuilt, stored))
        table.add_row(f"  {steps} steps per level", *peaks, "stored")
    return table
