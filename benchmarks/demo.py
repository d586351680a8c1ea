"""The demo: a RevNet and its ResNet twin on handwritten digits, and two normalizing flows.

Run:    make demo

Takes two to two and a half minutes on two cores. The digits are the 1,797 that scikit-learn ships.
"""

import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

FOLDER = Path("runs/demo")
TITLE = "RevNet-38 and its twin ResNet-32 on handwritten digits"
SOURCE = "the handwritten digits that scikit-learn ships"
EPOCHS = 12
SEEDS = range(3)
LINE = 80


def main() -> None:
    console = Console(highlight=False)
    try:
        demo(console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        os._exit(130)  # At once: on the way out, PyTorch would tidy up for seconds.
    except OSError as error:
        sys.exit(f"demo: {error}")


def demo(console: Console) -> None:
    """Compares the twins, trains the flows, and writes what is printed to `FOLDER`."""
    # Imported here, so that Ctrl-C is handled while PyTorch loads, too.
    import torch

    from benchmarks import demo_flows, reporting, twins, twins_report
    from revlib.train import Settings

    # With images this small, a second thread waits more than it works.
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    heading = "{device}, Python {Python}, torch {torch}, revlib {revlib}, {date}\n"
    console.print(TITLE, style="bold")
    console.print(heading.format_map(reporting.environment()))

    with tempfile.TemporaryDirectory() as runs, twins.progress_bars(console) as progress:
        settings = Settings(data="digits", out=Path(runs), epochs=EPOCHS, batch_size=64, lr=0.1)
        comparison = twins.compare(settings, SEEDS, progress)

    console.print(twins_report.result_table(comparison))
    console.print(twins_report.describe_outcome(comparison) + "\n", width=LINE)
    training = twins_report.describe_training(SOURCE, comparison)
    console.print(training + "\n", width=LINE, style="dim")
    files = twins_report.write_report(FOLDER / "demo", TITLE, SOURCE, "make demo", comparison)
    console.print("Wrote", ", ".join(map(str, files)) + "\n")

    with tempfile.TemporaryDirectory() as runs:
        files = demo_flows.demo(console, FOLDER, Path(runs))
    console.print("Wrote", ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
