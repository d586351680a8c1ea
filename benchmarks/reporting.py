"""What reports of several benchmarks share: what figures depend on, and tables in Markdown."""

import platform
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import torch

import revlib


def environment() -> dict[str, str]:
    """Returns what the figures depend on besides the code and the settings."""
    threads = torch.get_num_threads()
    cpu = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "revlib": revlib.__version__,
        "date": date.today().isoformat(),
    }


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligns the first column to the left, for names, and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Only Linux has it.
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
