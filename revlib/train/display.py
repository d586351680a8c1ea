"""What a run shows in a terminal: a bar while it trains, a line per epoch, a table at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revlib.train.results import Epoch, Progress, Result
from revlib.train.settings import Settings


@contextmanager
def progress_bar(epochs: int) -> Iterator[Callable[[Progress], None]]:
    """Shows a bar that the function it yields moves, and above it a line for each epoch."""
    bar = bars.Progress(
        bars.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        bars.BarColumn(),
        bars.TextColumn("loss {task.fields[loss]:.4f} accuracy {task.fields[accuracy]:.1%}"),
        bars.TextColumn("{task.fields[speed]:,.0f} images/s"),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def show(progress: Progress) -> None:
        fields = {
            "epoch": min(len(progress.history) + 1, epochs),
            "epochs": epochs,
            "loss": progress.loss,
            "accuracy": progress.accuracy,
            "speed": progress.images_per_second,
        }
        if bar.tasks:
            bar.update(bar.task_ids[0], completed=progress.step, **fields)
        else:
            bar.start()  # Not earlier: an error before the first step needs no empty bar above it.
            bar.add_task("", total=progress.steps, completed=progress.step, **fields)
        if progress.history and progress.history[-1].step == progress.step:
            bar.console.print(_epoch_line(progress.history[-1], epochs), highlight=False)

    try:
        yield show
    finally:
        if bar.tasks:
            bar.stop()


def _epoch_line(epoch: Epoch, epochs: int) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}"
        f"  train loss {epoch.train_loss:.4f} accuracy {epoch.train_accuracy:.1%}"
        f"  test loss {epoch.test_loss:.4f} accuracy {epoch.test_accuracy:.1%}"
    )


def result_table(result: Result, settings: Settings) -> Table:
    """Lays out the result for people; `summary.json` is for programs."""
    table = Table(title=Text(f"{settings.model} on {settings.data}"), show_header=False)
    rows = {
        "parameters": f"{result.parameters:,}",
        "test accuracy": f"{result.test_accuracy:.2%}",
        "test loss": f"{result.test_loss:.4f}",
        "train accuracy": f"{result.train_accuracy:.2%}",
        "train loss": f"{result.train_loss:.4f}",
        "epochs (steps)": f"{result.epochs} ({result.steps:,})",
        "images/s in training": f"{result.images_per_second:,.0f}",
        "weights": str(settings.out / "latest" / "model.safetensors"),
    }
    for name, value in rows.items():
        # A path may hold what rich takes for markup, and must not be cut where it is long.
        table.add_row(name, Text(value, overflow="fold"))
    return table
