"""Runs the benchmarks of flows, here and in other libraries, and reports them together.

Run:    make bench-flows DATA=cifar10.npz

The file holds `x_train, y_train, x_test, y_test` as Keras writes them; the images are 32x32, or
a multiple of it, in color. A part alone, such as the one that runs out of memory, or the one that
takes images as they are, such as 28x28 in grey:

        python -m benchmarks.flows cifar10.npz --only memory_limit
        python -m benchmarks.flows fashion_mnist.npz --only likelihood
"""

import sys
from functools import partial
from pathlib import Path

from benchmarks.pairing import add_differences
from benchmarks.parts import Parts
from benchmarks.peers import HERE

PEERS = [
    line for line in (HERE / "flow_peers.txt").read_text().splitlines() if not line.startswith("#")
]
FLOWS = Parts(
    name="benchmarks.flows",
    title=__doc__.partition("\n")[0],
    prefix="flow",
    out=Path("runs/bench-flows"),
    peers={
        "steps": PEERS,
        "likelihood": [peer for peer in PEERS if peer.startswith("normflows")],
        "rounding": [],
        "memory_limit": [],
    },
    compare=partial(add_differences, reference="rebuild"),
)

if __name__ == "__main__":
    sys.exit(FLOWS.main(sys.argv[1:]))
