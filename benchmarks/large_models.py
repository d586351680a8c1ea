"""Large and deep classifiers beside their stored twins: at ImageNet's size, and of 1001 layers.

Run:    python -m benchmarks.large_models --data cifar10.npz

Four questions, in some minutes on a CPU. What a training step on images of 224 x 224 keeps: asked
of fake tensors, which have shapes and no memory, for a step of 32 images is too much for most
CPUs; a real step of 2 images beside it shows that the figures are those of real tensors. How
what an i-RevNet keeps depends on its depth. How far the gradients of its first steps are off,
exact and not. And whether networks of 1001 layers can be trained where memory is short: each
trains in a process that the system refuses more than the allowance.
The file holds images of 32 x 32 as Keras writes them.
"""

import argparse
import copy
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.flow_memory_limit import ROOT, is_out_of_memory, limit_memory
from benchmarks.reporting import environment, markdown_table
from revlib.memory import MIB, StepMemory, measure_step
from revlib.models import IRevNet, create_model
from revlib.train import load_data

CLASSES, SIDE = 1000, 224
BATCH, REAL_BATCH = 32, 2
# The networks, and how they keep their activations; a ResNet has no choice.
LARGE = [
    ("resnet101", None),
    ("revnet104", "store"),
    ("revnet104", "rebuild"),
    ("irevnet_b", "store"),
    ("irevnet_b", "rebuild"),
    ("irevnet_a", "store"),
    ("irevnet_a", "rebuild"),
]
# Millions of parameters of the networks of the papers, and ours if they are others.
PUBLISHED = {
    "resnet101": ("44.5", "resnet101", {}),
    "revnet104": ("45.2", "revnet104", {}),
    "i-RevNet (b), published code": ("125.1", "irevnet_b", {}),
    "i-RevNet (b), paper": ("29", "irevnet_b", {"kernels": (1, 3, 1)}),
    "i-RevNet (a), paper": ("181", "irevnet_a", {}),
}
# The i-RevNets of the table by depth: what makes them of each kind. The last is padded as
# `irevnet_a` pads images of CIFAR-10.
KINDS = {
    "bijective": {"image_shape": (3, SIDE, SIDE), "squeeze": 4},
    "injective": {"image_shape": (3, SIDE, SIDE), "squeeze": 4, "padding": 48},
    "padded from 3 to 32": {"image_shape": (3, 32, 32), "padding": 29},
}
DEPTHS = (2, 8, 72)
# How the table by depth has each of them: one stored and two rebuilt, of which one is not exact.
WAYS = {"store": {"policy": "store"}, "rebuild": {}, "rebuild, floats": {"exact": False}}
# Of the i-RevNets whose gradients are compared: images a step, and steps.
GRADIENT_BATCH, GRADIENT_STEPS = 16, 3
DEEP = [("resnet1001", None), ("revnet1001", "store"), ("revnet1001", "rebuild")]
# Of the deep ones: images a step, steps an epoch, epochs, and the MiB that training may take.
DEEP_BATCH, STEPS, EPOCHS, ALLOWANCE = 16, 4, 6, 1024

NOTE = f"""\
Peak activations are the most that one training step has alive at once beside images, parameters,
gradients and optimizer state; kept is what it keeps for backward. Those of {BATCH} images are
*not of a real run*: they are counted on fake tensors, which hold no values. The columns of
{REAL_BATCH} images hold that against real tensors. i-RevNets are exact here, as by default."""

PARAMETERS_NOTE = """\
The authors published no code for the i-RevNet (a) of their paper: what that leaves open of its
widths and of its couplings by stage is our choice, and so ours has 199 million parameters instead
of 181. The sub-networks of the paper's (b) are convolutions of 1x1, 3x3 and 1x1, those of the
published code's three of 3x3. Errors were not measured here. Those published are, on ImageNet
(top-1): 24.7 for i-RevNet (a), 26.0 to 26.7 for (b), by source, 24.7 for the ResNet and 25.2 for
the RevNet; and on CIFAR-10 an accuracy of about 94.5 % for `irevnet_a` as it is there (Jacobsen et
al., 2018, https://arxiv.org/abs/1802.07088 and https://github.com/jhjacobsen/pytorch-i-revnet)."""

DEPTH_NOTE = f"""\
MiB kept of {BATCH} images, on fake tensors: the stream is one tensor of the features' size, and
`model(x)` with its loss keeps that and little more. Where the image is padded with more channels
than it has, as in the last rows, that is the padded one; a network that is not exact keeps the
input of the second coupling beside it there. The last rows are of images of 32 x 32, the others
of {SIDE} x {SIDE}. The authors' own code keeps every activation, as "store" does."""

GRADIENTS_NOTE = f"""\
The relative error of all gradients together, the largest of the first {GRADIENT_STEPS} steps of
{GRADIENT_BATCH} normalised images of CIFAR-10. Networks as young as these magnify rounding of any
kind. What a network of floats rebuilds is off by float32's, so its gradients are not quite those
of the activations that it computed. An exact network's are, to the last bit; but it rounds these
activations to multiples of 2**-12, and float32 is finer, so they are further from float64's. Under
bfloat16 autocast sub-networks round more coarsely than that, and stored gradients of both are as
far off."""


def label(name: str, policy: str | None) -> str:
    return name if policy is None else f"{name}, {policy}"


def build(name: str, policy: str | None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **options, **({} if policy is None else {"policy": policy}))


def step_memory(make: Callable[[], nn.Module], batch: int, side: int, *, fake: bool) -> StepMemory:
    with FakeTensorMode() if fake else nullcontext():
        model = make()
        x, y = torch.randn(batch, 3, side, side), torch.zeros(batch, dtype=torch.long)
        return measure_step(lambda: F.cross_entropy(model(x), y).backward(), model=model)


def measure_large(name: str, policy: str | None) -> dict[str, float]:
    size = {"image_shape": (3, SIDE, SIDE)} if name.startswith("irevnet") else {}

    def make() -> nn.Module:
        return build(name, policy, num_classes=CLASSES, **size)

    fake = step_memory(make, BATCH, SIDE, fake=True)
    small = step_memory(make, REAL_BATCH, SIDE, fake=True)
    real = step_memory(make, REAL_BATCH, SIDE, fake=False)
    return {
        f"kept, {BATCH} images, fake": fake.saved.activations / MIB,
        f"peak, {BATCH} images, fake": fake.peak.activations / MIB,
        f"peak, {REAL_BATCH} images, fake": small.peak.activations / MIB,
        f"peak, {REAL_BATCH} images, real": real.peak.activations / MIB,
    }


def count_parameters(published: str, name: str, options: dict[str, object]) -> dict[str, object]:
    size = {"image_shape": (3, SIDE, SIDE)} if name.startswith("irevnet") else {}
    with torch.device("meta"):
        model = build(name, None, num_classes=CLASSES, **size, **options)
    return {
        "ours": sum(p.numel() for p in model.parameters()) / 1e6,
        "published": published,
        "built by": f"`{name}`" + "".join(f", `{key}={value}`" for key, value in options.items()),
    }


def measure_depths(kind: str, **options: object) -> dict[str, float]:
    """Returns what a step keeps by the number of couplings, beside the size of the stream."""
    row = {}
    for depth in DEPTHS:

        def make(depth: int = depth) -> nn.Module:
            units = (depth // 2, depth // 2)
            return IRevNet(units, (1, 2), **KINDS[kind], **options)

        row["stream"] = 4 * BATCH * math.prod(make().feature_shape) / MIB
        memory = step_memory(make, BATCH, KINDS[kind]["image_shape"][1], fake=True)
        row[f"{depth} couplings"] = memory.saved.activations / MIB
    return row


def gradient(model: nn.Module, x: Tensor, y: Tensor, *, bf16: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in gradients])


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def measure_gradients(name: str, data: str, **options: object) -> dict[str, float]:
    """Trains for a moment, and compares each step with the same one stored, and in float64."""
    images = load_data(data)
    mean, std = images.mean[:, None, None], images.std[:, None, None]
    model = build(name, None, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    worst: dict[str, float] = {}
    for i in range(GRADIENT_STEPS):
        part = slice(i * GRADIENT_BATCH, (i + 1) * GRADIENT_BATCH)
        x, y = (images.x_train[part] - mean) / std, images.y_train[part]
        stored = copy.deepcopy(model)
        stored.policy = "store"
        true = gradient(copy.deepcopy(stored).double(), x.double(), y)
        errors = {}
        for precision, bf16 in (("float32", False), ("bf16 autocast", True)):
            of_stored, rebuilt = (
                gradient(copy.deepcopy(each), x, y, bf16=bf16) for each in (stored, model)
            )
            errors[f"{precision}: rebuilt from stored"] = relative_error(rebuilt, of_stored)
            errors[f"{precision}: stored from float64"] = relative_error(of_stored, true)
        worst = {key: max(error, worst.get(key, 0.0)) for key, error in errors.items()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return worst


def train(name: str, policy: str | None, data: str) -> dict[str, object]:
    """Trains under the limit, which holds for the rest of this process."""
    images = load_data(data)
    mean, std = images.mean[:, None, None], images.std[:, None, None]
    model = build(name, policy)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    # Whatever else torch loads on its first step does not count.
    F.cross_entropy(
        nn.Conv2d(3, 3, 3)(torch.zeros(1, 3, 4, 4)).mean((2, 3)), torch.zeros(1).long()
    )
    limit_memory(torch.device("cpu"), ALLOWANCE * MIB)
    losses, seconds, error = [], [], None
    try:
        for i in [*range(STEPS)] * EPOCHS:
            part = slice(i * DEEP_BATCH, (i + 1) * DEEP_BATCH)
            begun = time.perf_counter()
            loss = F.cross_entropy(
                model((images.x_train[part] - mean) / std), images.y_train[part]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - begun)
    except Exception as raised:
        if not is_out_of_memory(raised):
            raise
        error = f"out of memory in step {len(losses) + 1}"
    return {"losses": losses, "seconds": seconds, "error": error}


def train_apart(name: str, policy: str | None, data: str) -> dict[str, object]:
    """Trains in another process, so that the limit is that one's."""
    command = [sys.executable, "-m", "benchmarks.large_models", "--data", data, "--only", name]
    command += [] if policy is None else ["--policy", policy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def measure_deep(name: str, policy: str | None, data: str) -> dict[str, object]:
    memory = step_memory(lambda: build(name, policy), DEEP_BATCH, 32, fake=True)
    outcome = train_apart(name, policy, data)
    losses = outcome["losses"]
    done = outcome["error"] is None
    return {
        "peak activations, MiB": memory.peak.activations / MIB,
        f"with {ALLOWANCE} MiB": outcome["error"] or f"trained {len(losses)} steps",
        "loss, first epoch": statistics.mean(losses[:STEPS]) if done else "none",
        "loss, last epoch": statistics.mean(losses[-STEPS:]) if done else "none",
        "seconds per step": statistics.median(outcome["seconds"]) if done else "none",
    }


def table(rows: dict[str, dict[str, object]], form: str = ",.2f") -> str:
    lines = [
        [name, *(format(v, form) if isinstance(v, float) else str(v) for v in row.values())]
        for name, row in rows.items()
    ]
    return markdown_table(["", *next(iter(rows.values()))], lines)


def write_report(stem: Path, command: str, tables: dict[str, dict]) -> list[Path]:
    made_by = {"command": command, "seed": "0", **environment()}
    paragraphs = [
        "# Large and deep classifiers",
        f"## Images of {SIDE} x {SIDE}, {CLASSES} classes: MiB of a training step",
        table(tables["large"]),
        NOTE,
        "## Parameters, in millions",
        table(tables["parameters"]),
        PARAMETERS_NOTE,
        "## i-RevNets by depth",
        table(tables["depths"]),
        DEPTH_NOTE,
        "## i-RevNets at the start of training: how far gradients are off",
        table(tables["gradients"], ".1e"),
        GRADIENTS_NOTE,
        f"## 1001 layers: {EPOCHS} epochs of {STEPS} steps of {DEEP_BATCH} images",
        table(tables["deep"]),
        "Each trains in a process of its own. Once that has its libraries, data and weights, the "
        f"system refuses it more than {ALLOWANCE} MiB beyond, a limit of our choice, which must "
        "hold activations, gradients and optimizer state. The images are the first of CIFAR-10 "
        "(Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009). RevNet-1001 "
        "has 998 layers. Seconds are those of one thread on a machine that others used at the "
        "time.",
        "\n".join(f"- {name}: {value}" for name, value in made_by.items()),
    ]
    md, js = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("md", "json"))
    md.write_text("\n\n".join(paragraphs) + "\n")
    js.write_text(json.dumps({"made_by": made_by, **tables}, indent=2) + "\n")
    return [md, js]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="an .npz file of images of 32 x 32")
    parser.add_argument("--report", type=Path, default=Path("runs/large-models"))
    parser.add_argument("--only", choices=[name for name, _ in DEEP], help=argparse.SUPPRESS)
    parser.add_argument("--policy", choices=["store", "rebuild"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(train(options.only, options.policy, options.data)))
        return
    data = str(Path(options.data).resolve())
    tables = {
        "large": {label(*each): measure_large(*each) for each in LARGE},
        "parameters": {name: count_parameters(*each) for name, each in PUBLISHED.items()},
        "depths": {
            f"{kind}, {way}": measure_depths(kind, **options)
            for kind in KINDS
            for way, options in WAYS.items()
        },
        "gradients": {
            f"{name}, {'exact' if exact else 'floats'}": measure_gradients(name, data, exact=exact)
            for name in ("irevnet_a", "irevnet_b")
            for exact in (False, True)
        },
        "deep": {label(*each): measure_deep(*each, data) for each in DEEP},
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.large_models", *arguments])
    files = write_report(options.report, command, tables)
    print(files[0].read_text(), "\nwrote", *files)


if __name__ == "__main__":
    main(sys.argv[1:])
