"""The demo: a RevNet and its ResNet twin on handwritten digits, accuracy, memory and time.

Run:    make demo

Takes about a minute on two cores. The digits are the 1,797 that scikit-learn ships.
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console

FOLDER = Path("runs/demo")
TITLE = "RevNet-38 and its twin ResNet-32 on handwritten digits"
SOURCE = "the handwritten digits that scikit-learn ships"
EPOCHS = 10
SEEDS = range(3)


def main() -> None:
    console = Console(highlight=False)
    try:
        demo(console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)


def demo(console: Console) -> None:
    """Compares the twins, prints the table and writes it to `FOLDER`."""
    # Imported here, so that Ctrl-C is handled while PyTorch loads, too.
    import torch

    from benchmarks.twins import compare, progress_bars
    from benchmarks.twins_report import (
        describe_outcome,
        describe_training,
        environment,
        result_table,
        write_report,
    )
    from revlib.train import Settings

    # With images this small, a second thread waits more than it works.
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    console.print(TITLE, style="bold")
    console.print(
        "{device}, Python {Python}, torch {torch}, revlib {revlib}, {date}".format_map(
            environment()
        )
    )
    console.print()
    with tempfile.TemporaryDirectory() as runs, progress_bars(console) as progress:
        settings = Settings(data="digits", out=Path(runs), epochs=EPOCHS, batch_size=64, lr=0.1)
        comparison = compare(settings, SEEDS, progress)
    console.print(result_table(comparison))
    console.print(describe_outcome(comparison))
    console.print()
    console.print(describe_training(SOURCE, comparison), style="dim")
    console.print()
    files = write_report(FOLDER / "demo", TITLE, SOURCE, "make demo", comparison)
    console.print("Wrote", ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
