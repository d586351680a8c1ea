"""A comparison of the twins: a table and a picture for people, JSON for programs."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from benchmarks.reporting import environment, markdown_table
from benchmarks.twins import (
    IREVNET,
    RESNET,
    REVNET,
    STORED,
    STORED_IREVNET,
    Comparison,
    Contender,
)
from revlib.memory import MIB

COLORS = {
    RESNET.label: "#7d838c",
    STORED.label: "#86b9dd",
    REVNET.label: "#0864ab",
    STORED_IREVNET.label: "#e3ae85",
    IREVNET.label: "#c2570c",
}
INK = "#2b2f36"
SHARED_SETTINGS = ("epochs", "batch_size", "lr", "weight_decay", "augment", "mixed_precision")
NOTE = """\
Multiply-adds are those of the forward pass. Peak activations are those of one training step,
without the images, parameters, gradients and optimizer state; the deeper networks have more
blocks of the same widths. A network called stored is the same one with its activations stored
instead of rebuilt. Time is the median over rounds in which each network steps once, and a ratio
is the median of the rounds' ratios."""


def describe_training(source: str, comparison: Comparison) -> str:
    settings = comparison.settings
    channels, height, width = comparison.image_shape
    seeds = ", ".join(str(run.seed) for run in comparison.runs_of(REVNET))
    augmentation = "random crops and mirror images" if settings.augment else "no augmentation"
    precision = "float32" if settings.mixed_precision == "no" else settings.mixed_precision
    return (
        f"Trained on {source}: {comparison.train_images:,} images of "
        f"{channels} x {height} x {width} to train, {comparison.test_images:,} to test; "
        f"{settings.epochs} epochs, batch {settings.batch_size}, "
        f"learning rate {settings.lr}, {augmentation}, "
        f"{precision}, seeds {seeds}."
    )


def describe_outcome(comparison: Comparison) -> str:
    outcome = describe_twins(comparison)
    if IREVNET not in comparison.contenders:
        return outcome
    peaks = [peak / MIB for peak in comparison.peak_bytes[IREVNET.label].values()]
    over_resnet = comparison.time_ratio(IREVNET, RESNET)
    over_stored = comparison.time_ratio(IREVNET, STORED_IREVNET)
    return (
        f"{outcome} The i-RevNet's activations peak at {peaks[0]:.1f} MiB with {IREVNET.layers} "
        f"layers and at {peaks[-1]:.1f} MiB with {max(IREVNET.units)}; a step of "
        f"{IREVNET.label} takes {over_resnet:.2f} times as long as one of {RESNET.label}, and "
        f"{over_stored:.2f} times as long as its own would with its activations stored."
    )


def describe_twins(comparison: Comparison) -> str:
    depth = max(REVNET.units)
    resnet, revnet = (comparison.peak_bytes[each.label][depth] for each in (RESNET, REVNET))
    over_resnet, over_stored = (comparison.time_ratio(REVNET, base) for base in (RESNET, STORED))
    return (
        f"With {depth} layers the RevNet's activations peak at {revnet / MIB:.1f} MiB and the "
        f"ResNet's at {resnet / MIB:.1f} MiB, {resnet / revnet:.1f} times as much. A step of "
        f"{REVNET.label} takes {over_resnet:.2f} times as long as one of {RESNET.label}, and "
        f"{over_stored:.2f} times as long as its own would with its activations stored."
    )


def rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yields every figure: its name, and its value for each contender."""

    def peak_mebibytes(contender: Contender, layers: int) -> float:
        return comparison.peak_bytes[contender.label][layers] / MIB

    def row(name: str, value: Callable[[Contender], str]) -> list[str]:
        return [name, *map(value, comparison.contenders)]

    yield row("parameters", lambda each: f"{comparison.parameters[each.label]:,}")
    yield row(
        "multiply-adds per image",
        lambda each: f"{comparison.multiply_adds[each.label] / 1e6:.1f} M",
    )
    yield row(
        "test accuracy",
        lambda each: _percent(*comparison.accuracy(each)) if each.trained else "not measured",
    )
    yield row("peak activations, MiB", lambda each: "")
    for depths in zip(*(each.units for each in comparison.contenders), strict=True):
        peaks = map(peak_mebibytes, comparison.contenders, depths)
        yield [f"  {'/'.join(map(str, sorted(set(depths))))} layers", *map("{:.1f}".format, peaks)]
    yield row("ms per step", lambda each: f"{1000 * comparison.median_seconds(each):.1f}")
    yield row("  over ResNet-32", lambda each: f"{comparison.time_ratio(each, RESNET):.2f} x")
    yield row(
        "  over RevNet-38 stored", lambda each: f"{comparison.time_ratio(each, STORED):.2f} x"
    )
    if IREVNET in comparison.contenders:
        yield row(
            "  over i-RevNet-34 stored",
            lambda each: f"{comparison.time_ratio(each, STORED_IREVNET):.2f} x",
        )


def result_table(comparison: Comparison) -> Table:
    """Lays the figures out: the twins' for 80 columns, those of all contenders for 110."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for contender in comparison.contenders:
        style = "bold" if contender is REVNET else None
        table.add_column(contender.label, justify="right", style=style)
    for row in rows(comparison):
        table.add_row(*row)
    return table


def write_report(
    stem: Path, title: str, source: str, command: str, comparison: Comparison
) -> list[Path]:
    """Writes the picture, the table as Markdown, and every figure as JSON.

    Args:
        stem: The path of the three files without their suffixes.
        title: What was compared on what.
        source: Where the images come from.
        command: What makes the files.
    """
    png, md, js = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "md", "json"))
    made_by = {"command": command, **environment()}
    draw(title, comparison).savefig(png, dpi=160)

    header = ["", *(contender.label for contender in comparison.contenders)]
    paragraphs = [
        f"# {title}",
        describe_outcome(comparison),
        markdown_table(header, rows(comparison)),
        f"![Memory against depth, and accuracy]({png.name})",
        describe_training(source, comparison),
        NOTE,
        "\n".join(f"- {name}: {value}" for name, value in made_by.items()),
    ]
    md.write_text("\n\n".join(paragraphs) + "\n")

    record = {"title": title, "source": source, "made_by": made_by}
    record |= dataclasses.asdict(comparison)
    record["settings"] = {name: record["settings"][name] for name in SHARED_SETTINGS}
    js.write_text(json.dumps(record, indent=2) + "\n")
    return [png, md, js]


def draw(title: str, comparison: Comparison) -> Figure:
    """Draws memory against depth, and accuracy beside it."""
    accuracies = 1.5 * len(comparison.trained)
    figure = Figure(figsize=(6 + accuracies, 4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    left, right = figure.subplots(1, 2, width_ratios=[6, accuracies])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb")
        axes.set_axisbelow(True)
    _draw_memory(left, comparison)
    _draw_accuracy(right, comparison)
    return figure


def _draw_memory(axes: Axes, comparison: Comparison) -> None:
    for contender in comparison.contenders:
        peaks = comparison.peak_bytes[contender.label]
        mebibytes = [peak / MIB for peak in peaks.values()]
        axes.plot(
            list(peaks),
            mebibytes,
            color=COLORS[contender.label],
            label=f"{contender.label}: {mebibytes[0]:,.1f} to {mebibytes[-1]:,.1f}",
            linestyle="solid" if contender.trained else "dashed",
            linewidth=2,
            marker="o",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layers", color=INK)
    axes.set_title("peak activations of a training step, MiB", loc="left", color=INK, size=10)
    axes.legend(loc="upper left", frameon=False, labelcolor="linecolor")


def _draw_accuracy(axes: Axes, comparison: Comparison) -> None:
    for position, contender in enumerate(comparison.trained):
        color = COLORS[contender.label]
        for run in comparison.runs_of(contender):
            axes.plot(position, 100 * run.test_accuracy[-1], "o", color=color, alpha=0.4)
        mean, error = comparison.accuracy(contender)
        axes.errorbar(position, 100 * mean, 100 * error, color=color, capsize=8, fmt="_", ms=24)
    labels = [
        f"{each.label}\n{_percent(*comparison.accuracy(each))}" for each in comparison.trained
    ]
    axes.set_xticks(range(len(comparison.trained)), labels, color=INK)
    axes.set_xlim(-0.6, len(comparison.trained) - 0.4)
    # Wide enough that a difference within the error looks like one.
    final = [100 * run.test_accuracy[-1] for run in comparison.runs]
    axes.set_ylim(min(final) - 1.5, min(max(final) + 1.5, 100))
    axes.set_title("test accuracy, %", loc="left", color=INK, size=10)


def _percent(mean: float, error: float) -> str:
    return f"{100 * mean:.2f} ± {100 * error:.2f} %"
