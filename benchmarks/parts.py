"""Runs a set of benchmarks part by part, here and in other libraries, and reports them together.

A part is a file of benchmarks, run in a process of its own. A library that cannot be installed
or run is reported as not measured.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.peers import HERE, install, run
from revlib.benchmarking.records import Report, read
from revlib.benchmarking.report import to_terminal, write


@dataclass(frozen=True)
class Parts:
    """A set of benchmarks.

    Attributes:
        name: That of the module that runs it.
        title: What it measures.
        prefix: What the names of its files begin with, before that of the part.
        out: Where results go unless asked otherwise.
        peers: The other libraries that each part is run with.
        compare: Adds to the report what only ours and theirs together tell.
    """

    name: str
    title: str
    prefix: str
    out: Path
    peers: Mapping[str, Sequence[str]]
    compare: Callable[[Report], None] = lambda report: None

    def main(self, arguments: Sequence[str]) -> int:
        options = self._parse(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
        written, failed = [], False
        for part in options.only:
            results = options.out / f"{part}.json"
            results.unlink(missing_ok=True)
            command = self._suite(part, results, options)
            failed |= subprocess.run([*command, "-v"]).returncode != 0
            written += [results] if results.exists() else []
            for peer in self.peers[part] if options.peers else []:
                print(f"{part}: {peer} ...", flush=True)
                results = options.out / f"{part}-{peer}.json"
                results.unlink(missing_ok=True)
                run_peer(peer, self._suite(part, results, options), results)
                written.append(results)
        report = read(written, shlex.join(["python", "-m", self.name, *arguments]))
        self.compare(report)
        if not options.times:
            load = os.getloadavg()[0]
            why = f"left out by --no-times; the load average was {load:.1f}"
            report.not_measured["times"] = why
        to_terminal(report, Console())
        for path in write(report, options.out):
            print(f"wrote {path}")
        return int(failed)

    def _suite(self, part: str, results: Path, options: argparse.Namespace) -> list[str]:
        """Returns the command that runs a part and writes its results."""
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.flow_options"]
        command += [str(HERE / f"{self.prefix}_{part}.py"), "--data", str(options.data)]
        command += ["--benchmark-quiet", "--benchmark-json", str(results)]
        command += ["--quick"] if options.quick else []
        return command if options.times else [*command, "--no-times"]

    def _parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("data", type=Path, help="an .npz file of images, as Keras writes them")
        parts = list(self.peers)
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
        parser.add_argument("--out", type=Path, default=self.out)
        parser.add_argument("--no-peers", dest="peers", action="store_false", help="only ours")
        parser.add_argument(
            "--quick", action="store_true", help="run all at sizes that tell nothing"
        )
        parser.add_argument(
            "--no-times",
            dest="times",
            action="store_false",
            help="take no times: the machine is busy",
        )
        options = parser.parse_args(arguments)
        if not options.data.is_file():
            parser.error(f"data must be an .npz file; got {options.data}")
        return options


def run_peer(peer: str, command: Sequence[str], results: Path) -> None:
    """Runs a part with another library; a failure is left where the results would be."""
    failure = install(peer)
    if failure is None:
        # The peers' warnings are their own affair.
        failure = run([*command, "--peer", peer, "-W", "ignore"])
    if not results.exists():
        results.write_text(json.dumps({"benchmarks": [], "not_measured": {peer: failure}}))
