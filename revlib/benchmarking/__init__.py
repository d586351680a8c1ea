"""Memory beside time in pytest-benchmark, and a report of both.

`measure` is called in a benchmark, and `python -m revlib.benchmarking` reports what it found.
"""

from revlib.benchmarking.measuring import measure

__all__ = ["measure"]
