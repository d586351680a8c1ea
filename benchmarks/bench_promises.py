"""Which promises a training step keeps when its activations are rebuilt, or checkpointed.

Run:    make bench
"""

import pytest

from benchmarks.couplings import METHODS
from benchmarks.promises import outcomes


@pytest.mark.parametrize("method", ["rebuild", "checkpoint per block"])
@pytest.mark.benchmark(group="promises")
def bench_promises(benchmark, method):
    benchmark.extra_info.update(benchmark.pedantic(outcomes, args=(METHODS[method],)))
