"""Reports benchmarks: prints their tables, and writes them as Markdown, JSON and pictures."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from revlib.benchmarking.records import read
from revlib.benchmarking.report import to_terminal, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m revlib.benchmarking", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="a folder; that of the first file by default")
    given = parser.parse_args()
    try:
        report = read(given.files)
    except ValueError as error:
        sys.exit(str(error))
    console = Console()
    to_terminal(report, console)
    for path in write(report, given.out or given.files[0].parent):
        console.print(f"wrote {path}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
