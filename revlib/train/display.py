"""What a run shows in a terminal: a bar while it trains, a line per epoch, a table at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revlib.train.results import AnyProgress, AnyResult
from revlib.train.settings import Settings


@contextmanager
def progress_bar(epochs: int) -> Iterator[Callable[[AnyProgress], None]]:
    """Shows a bar that the function it yields moves, and above it a line for each epoch."""
    bar = bars.Progress(
        bars.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[now]}"),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def show(progress: AnyProgress) -> None:
        fields = {
            "epoch": min(len(progress.history) + 1, epochs),
            "epochs": epochs,
            "now": progress.line(),
        }
        if bar.tasks:
            bar.update(bar.task_ids[0], completed=progress.step, **fields)
        else:
            bar.start()  # Not earlier: an error before the first step needs no empty bar above it.
            bar.add_task("", total=progress.steps, completed=progress.step, **fields)
        if progress.history and progress.history[-1].step == progress.step:
            number = f"{len(progress.history):>{len(str(epochs))}}/{epochs}"
            bar.console.print(f"epoch {number}  {progress.epoch_line()}", highlight=False)

    try:
        yield show
    finally:
        if bar.tasks:
            bar.stop()


def result_table(result: AnyResult, settings: Settings) -> Table:
    """Lays out the result for people; `summary.json` is for programs."""
    table = Table(title=Text(f"{settings.model} on {settings.data}"), show_header=False)
    rows = dict(result.rows())
    rows["weights"] = str(settings.out / "latest" / "model.safetensors")
    if (settings.out / "pictures").is_dir():
        rows["pictures"] = str(settings.out / "pictures")
    for name, value in rows.items():
        # A path may hold what rich takes for markup, and must not be cut where it is long.
        table.add_row(name, Text(value, overflow="fold"))
    return table
