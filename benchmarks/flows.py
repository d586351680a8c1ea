"""Runs the benchmarks of flows, here and in other libraries, and reports them together.

Run:    make bench-flows DATA=cifar10.npz

The file holds `x_train, y_train, x_test, y_test` as Keras writes them; the images are 32x32, or
a multiple of it, in color. A part alone, such as the one that runs out of memory:

        python -m benchmarks.flows cifar10.npz --only memory_limit

A library that cannot be installed or run is reported as not measured.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.peers import HERE, install, run
from revlib.benchmarking.records import read
from revlib.benchmarking.report import to_terminal, write

PEERS = [
    line for line in (HERE / "flow_peers.txt").read_text().splitlines() if not line.startswith("#")
]
PARTS = {
    "steps": PEERS,
    "likelihood": [peer for peer in PEERS if peer.startswith("normflows")],
    "rounding": [],
    "memory_limit": [],
}


def suite(part: str, results: Path, options: argparse.Namespace) -> list[str]:
    """Returns the command that runs a part and writes its results."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.flow_options"]
    command += [str(HERE / f"flow_{part}.py"), "--data", str(options.data), "--benchmark-quiet"]
    command += ["--benchmark-json", str(results), *(["--quick"] if options.quick else [])]
    return command if options.times else [*command, "--no-times"]


def run_peer(peer: str, command: Sequence[str], results: Path) -> None:
    """Runs a part with another library; a failure is left where the results would be."""
    failure = install(peer)
    if failure is None:
        # The peers' warnings are their own affair.
        failure = run([*command, "--peer", peer, "-W", "ignore"])
    if not results.exists():
        results.write_text(json.dumps({"benchmarks": [], "not_measured": {peer: failure}}))


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    written, failed = [], False
    for part in options.only:
        results = options.out / f"{part}.json"
        results.unlink(missing_ok=True)
        command = suite(part, results, options)
        failed |= subprocess.run([*command, "-v"]).returncode != 0
        written += [results] if results.exists() else []
        for peer in PARTS[part] if options.peers else []:
            print(f"{part}: {peer} ...", flush=True)
            results = options.out / f"{part}-{peer}.json"
            results.unlink(missing_ok=True)
            run_peer(peer, suite(part, results, options), results)
            written.append(results)
    report = read(written, shlex.join(["python", "-m", "benchmarks.flows", *arguments]))
    if not options.times:
        load = os.getloadavg()[0]
        report.not_measured["times"] = f"left out by --no-times; the load average was {load:.1f}"
    to_terminal(report, Console())
    for path in write(report, options.out):
        print(f"wrote {path}")
    return int(failed)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="an .npz file of images, as Keras writes them")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-flows"))
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="only ours")
    parser.add_argument("--quick", action="store_true", help="run all at sizes that tell nothing")
    parser.add_argument(
        "--no-times", dest="times", action="store_false", help="take no times: the machine is busy"
    )
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"data must be an .npz file; got {options.data}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
