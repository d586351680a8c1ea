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
    parser.add_argument("--command", help="what was run to make the figures, for the header")
    given = parser.parse_args()
    try:
        report = read(given.files, given.command)
        files = write(report, given.out or given.files[0].parent)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    console = Console()
    to_terminal(report, console)
    for path in files:
        console.print(f"wrote {path}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
