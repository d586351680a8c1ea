"""Installs the peers, each in a folder of its own, and runs the peer suite once for each.

A process for each, because one of them has our import name, and because they may crash. A
peer that cannot be installed or run leaves a file that says why, for the report.

Run:    make bench
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = [
    line for line in (HERE / "peers.txt").read_text().splitlines() if not line.startswith("#")
]
FOLDER = Path("runs", "peers")


def run(command: list[str]) -> str | None:
    """Runs a command; returns None if it went well, and otherwise the last error it tells."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
    return errors[-1] if errors else f"exit status {done.returncode}"


def install(requirement: str) -> str | None:
    """Installs a peer, unless it is there; returns None, or why it cannot."""
    target = FOLDER / requirement
    if target.is_dir():
        return None
    unfinished = target.with_name(f"{requirement}.unfinished")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    failure = run([*pip, "--upgrade", "--target", str(unfinished), requirement])
    if failure is None:
        unfinished.rename(target)
    return failure


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for requirement in REQUIREMENTS:
        print(f"{requirement} ...", flush=True)
        results = out / f"{requirement}.json"
        results.unlink(missing_ok=True)
        failure = install(requirement)
        if failure is None:
            suite = [sys.executable, "-m", "pytest", str(HERE / "peer_suite.py")]
            # The peers' warnings are their own affair.
            suite += ["-W", "ignore", "--peer", requirement, "--benchmark-json", str(results)]
            failure = run(suite)
        if not results.exists():
            results.write_text(
                json.dumps({"benchmarks": [], "not_measured": {requirement: failure}})
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
