"""RevNet-38 against its twin ResNet-32: trained alike, and measured on the step they trained by.

An i-RevNet of their size can join them. Accuracy, memory and time come from three passes.
Training goes through `revlib.train`, with the same settings for all and their runs in turn.
Memory is counted to the byte, at three depths. Time is taken over rounds in which every contender
steps once, so that a busy moment of the machine meets all of them.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich import progress as bars
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from revlib.autograd import Policy
from revlib.memory import measure_step
from revlib.models import IRevNet, ResNet, RevNet, irevnet34
from revlib.train import Images, Progress, Settings, load_data, train

ROUNDS = 30


@dataclass(frozen=True)
class Contender:
    """A model, and the deeper ones of the same widths.

    Args:
        label: What people call it.
        name: What `revlib.models` calls it.
        make: Builds it, from the blocks per stage and the images.
        units: The blocks per stage, by the number of layers; its own, then those of deeper ones.
        trained: Whether its accuracy is measured, too.
    """

    label: str
    name: str
    make: Callable[[Sequence[int], Images], nn.Module]
    units: Mapping[int, Sequence[int]]
    trained: bool = True

    @property
    def layers(self) -> int:
        return min(self.units)

    def build(self, images: Images, layers: int | None = None) -> nn.Module:
        """Builds it for these images, with its own number of layers or a deeper one's."""
        return self.make(self.units[layers or self.layers], images)


def resnet(units: Sequence[int], images: Images) -> ResNet:
    channels = images.x_train.shape[1]
    return ResNet(units, (16, 16, 32, 64), num_classes=images.classes, in_channels=channels)


def revnet(units: Sequence[int], images: Images, policy: Policy = "rebuild") -> RevNet:
    channels = images.x_train.shape[1]
    return RevNet(
        units,
        (32, 32, 64, 112),
        num_classes=images.classes,
        in_channels=channels,
        policy=policy,
    )


def irevnet(units: Sequence[int], images: Images, policy: Policy = "rebuild") -> IRevNet:
    shape = tuple(images.x_train.shape[1:])
    return irevnet34(units=units, image_shape=shape, num_classes=images.classes, policy=policy)


RESNET = Contender("ResNet-32", "resnet32", resnet, {32: (5,) * 3, 110: (18,) * 3, 218: (36,) * 3})
REVNET = Contender("RevNet-38", "revnet38", revnet, {38: (3,) * 3, 110: (9,) * 3, 218: (18,) * 3})
STORED = replace(
    REVNET, label="RevNet-38 stored", make=partial(revnet, policy="store"), trained=False
)
IREVNET = Contender(
    "i-RevNet-34", "irevnet34", irevnet, {34: (7, 4), 109: (23, 13), 217: (46, 26)}
)
STORED_IREVNET = replace(
    IREVNET, label="i-RevNet-34 stored", make=partial(irevnet, policy="store"), trained=False
)
TWINS = (RESNET, STORED, REVNET)
CONTENDERS = (*TWINS, STORED_IREVNET, IREVNET)


@dataclass(frozen=True)
class Run:
    """What one training run came to.

    Args:
        seconds: The time that its training steps took.
        test_accuracy: After each epoch, between 0 and 1.
    """

    label: str
    seed: int
    seconds: float
    test_accuracy: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """What was measured, by the label of the contender.

    Args:
        settings: What all were trained with.
        train_images: Their number.
        test_images: Their number.
        image_shape: Channels, height and width.
        runs: Those of each seed, one contender after the other.
        parameters: Their number.
        multiply_adds: Of the forward pass of one image.
        peak_bytes: Peak activation bytes of a training step, by the number of layers.
        step_seconds: Of a training step in each round; every contender steps once in a round.
    """

    settings: Settings
    train_images: int
    test_images: int
    image_shape: Sequence[int]
    runs: Sequence[Run]
    parameters: Mapping[str, int]
    multiply_adds: Mapping[str, int]
    peak_bytes: Mapping[str, Mapping[int, int]]
    step_seconds: Mapping[str, Sequence[float]]

    @property
    def contenders(self) -> list[Contender]:
        """Those that were compared."""
        return [each for each in CONTENDERS if each.label in self.step_seconds]

    @property
    def trained(self) -> list[Contender]:
        return [each for each in self.contenders if each.trained]

    def runs_of(self, contender: Contender) -> list[Run]:
        return [run for run in self.runs if run.label == contender.label]

    def accuracy(self, contender: Contender) -> tuple[float, float]:
        """Returns the mean test accuracy at the end, over the seeds, and its standard error."""
        final = [run.test_accuracy[-1] for run in self.runs_of(contender)]
        return statistics.mean(final), statistics.stdev(final) / len(final) ** 0.5

    def median_seconds(self, contender: Contender) -> float:
        return statistics.median(self.step_seconds[contender.label])

    def time_ratio(self, contender: Contender, base: Contender) -> float:
        """Returns the median, over the rounds, of one's step time as a multiple of another's."""
        pairs = zip(self.step_seconds[contender.label], self.step_seconds[base.label], strict=True)
        return statistics.median(seconds / base_seconds for seconds, base_seconds in pairs)


def progress_bars(console: Console) -> bars.Progress:
    """Makes what `compare` shows its passes on."""
    return bars.Progress(
        bars.TextColumn("{task.description:6}"),
        bars.BarColumn(24),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[now]}"),
        console=console,
    )


def compare(
    settings: Settings,
    seeds: Iterable[int],
    progress: bars.Progress,
    contenders: Sequence[Contender] = TWINS,
) -> Comparison:
    """Trains the contenders with every seed, and measures their memory and time.

    Args:
        settings: What all are trained with; runs below `settings.out` are gone on with.
        seeds: All are trained with each.
        progress: Shows a bar for each pass.
        contenders: Some of `CONTENDERS`, the twins among them.
    """
    images = load_data(settings.data)
    models = {contender.label: contender.build(images) for contender in contenders}
    return Comparison(
        settings=settings,
        train_images=len(images.x_train),
        test_images=len(images.x_test),
        image_shape=images.x_train.shape[1:],
        runs=train_all(settings, seeds, progress, contenders),
        parameters={
            label: sum(parameter.numel() for parameter in model.parameters())
            for label, model in models.items()
        },
        multiply_adds={
            label: count_multiply_adds(model, images) for label, model in models.items()
        },
        peak_bytes=measure_memory(settings, images, progress, contenders),
        step_seconds=measure_time(settings, images, progress, contenders),
    )


def train_all(
    settings: Settings,
    seeds: Iterable[int],
    progress: bars.Progress,
    contenders: Sequence[Contender],
) -> list[Run]:
    """Trains the contenders with each seed, every run in a folder of its own."""
    plan = [(each, seed) for seed in seeds for each in contenders if each.trained]
    bar = progress.add_task("train", total=len(plan), now="")
    runs: list[Run] = []

    def show(state: Progress) -> None:
        contender, seed = plan[len(runs)]
        progress.update(
            bar,
            completed=len(runs) + state.step / state.steps,
            now=f"{contender.label}, seed {seed}: accuracy {state.accuracy:.0%}",
        )

    for contender, seed in plan:
        out = settings.out / f"{contender.name}-seed{seed}"
        result = train(
            # None leaves each model what it has by default: a ResNet has neither.
            replace(settings, model=contender.name, policy=None, exact=None, seed=seed, out=out),
            resume=os.path.lexists(out / "latest"),
            on_progress=show,
        )
        epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        accuracies = [epoch["test_accuracy"] for epoch in epochs]
        runs.append(Run(contender.label, seed, result.seconds, accuracies))
        progress.update(bar, completed=len(runs))
    progress.update(bar, now=f"{len(runs)} runs")
    return runs


class TrainingStep:
    """The step by which `revlib.train` trains, always on the first batch."""

    def __init__(self, model: nn.Module, images: Images, settings: Settings) -> None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        batch = slice(settings.batch_size)
        x = (images.x_train[batch] - images.mean[:, None, None]) / images.std[:, None, None]
        self.x, self.y = x.to(device), images.y_train[batch].to(device)
        self.model = model.to(device)
        self.optimizer = torch.optim.SGD(
            model.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        )
        self.bf16 = settings.mixed_precision == "bf16"

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_memory(
    settings: Settings,
    images: Images,
    progress: bars.Progress,
    contenders: Sequence[Contender],
) -> dict[str, dict[int, int]]:
    """Returns the peak activation bytes of a step, by contender and number of layers."""
    bar = progress.add_task("memory", total=3 * len(contenders), now="")
    peak_bytes: dict[str, dict[int, int]] = {each.label: {} for each in contenders}
    for contender in contenders:
        for layers in contender.units:
            progress.update(bar, now=f"{contender.label}, {layers} layers")
            step = TrainingStep(contender.build(images, layers), images, settings)
            step()  # On a GPU, the first one also allocates what its libraries keep.
            memory = measure_step(step, model=step.model, optimizer=step.optimizer)
            peak_bytes[contender.label][layers] = memory.peak.activations
            progress.advance(bar)
    progress.update(bar, now=f"{progress.tasks[bar].completed:.0f} steps")
    return peak_bytes


def measure_time(
    settings: Settings,
    images: Images,
    progress: bars.Progress,
    contenders: Sequence[Contender],
) -> dict[str, list[float]]:
    """Returns the seconds of a step in each round, by contender."""
    bar = progress.add_task("time", total=ROUNDS, now=f"{ROUNDS} rounds")
    steps = {each.label: TrainingStep(each.build(images), images, settings) for each in contenders}
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for label, step in steps.items():
            seconds[label].append(stopwatch(step))
        progress.advance(bar)
    return seconds


def stopwatch(step: TrainingStep) -> float:
    begun = time.perf_counter()
    step()
    if step.x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def count_multiply_adds(model: nn.Module, images: Images) -> int:
    """Counts those of the forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *images.x_train.shape[1:]))
    return counter.get_total_flops() // 2
