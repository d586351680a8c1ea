"""Runs the benchmarks of exact chains, and of the drift that they are without.

Run:    make bench-exact DATA=cifar10.npz

The file holds `x_train, y_train, x_test, y_test` as Keras writes them; the images are 32x32, or
a multiple of it, in color. It takes about half an hour on one core. A part alone:

        python -m benchmarks.exactness cifar10.npz --only chains
"""

import sys
from pathlib import Path

from benchmarks.parts import Parts
from benchmarks.peers import REQUIREMENTS

EXACTNESS = Parts(
    name="benchmarks.exactness",
    title=__doc__.partition("\n")[0],
    prefix="exact",
    out=Path("runs/bench-exact"),
    peers={
        "chains": [peer for peer in REQUIREMENTS if not peer.startswith("revlib")],
        "flows": [peer for peer in REQUIREMENTS if peer.startswith("memcnn")],
        "training": [],
        "cost": [],
        "anchors": [],
    },
)

if __name__ == "__main__":
    sys.exit(EXACTNESS.main(sys.argv[1:]))
