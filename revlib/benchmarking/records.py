"""Reads pytest-benchmark's JSON into the figures that a report shows.

Any benchmarks will do; those that called :func:`revlib.benchmarking.measure` have memory too.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revlib.memory import MIB

PEAK = "peak activations, MiB"
SAVED = "saved activations, MiB"
OTHER = "other memory, MiB"
TIME = "time, ms"
ERROR = "error"  # the names of errors begin so

# What `measure` records for the header, or shows in another form.
_NO_VALUES = {"device", "threads", "seed", "torch", "revlib", "time_ratios"}
_NO_VALUES |= {"peak_bytes", "saved_bytes", "replay_state_bytes"}


@dataclass(frozen=True)
class Ratio:
    """The time of a step over that of another which ran in turn with it, over all rounds."""

    median: float
    first_quartile: float
    third_quartile: float


Value = float | str | Ratio


@dataclass(frozen=True)
class Row:
    """The values of one benchmark.

    Attributes:
        name: Its parameters but for the one of the axis; its own name if it has no others.
        position: Its place on the axis; None if its group has none.
        values: What was found, by names that tell the unit.
    """

    name: str
    position: int | None
    values: dict[str, Value]


@dataclass(frozen=True)
class Group:
    """Benchmarks that belong together.

    Attributes:
        title: Their group in pytest-benchmark.
        axis: The first parameter with several whole numbers, such as a depth; None without.
        rows: The benchmarks.
    """

    title: str
    axis: str | None
    rows: list[Row]


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        made_by: What the values depend on, such as the device and the versions.
        groups: The values.
        not_measured: What was left out, and why.
    """

    made_by: dict[str, str]
    groups: list[Group]
    not_measured: dict[str, str]


def read(paths: Sequence[Path], command: str | None = None) -> Report:
    """Reads the benchmarks of all files as those of one run.

    Args:
        paths: The files.
        command: What was run to write them, for the header.

    Raises:
        ValueError: If a file is not what `--benchmark-json` writes, or none has benchmarks.
    """
    runs = [_load(path) for path in paths]
    measured = [run for run in runs if run["benchmarks"]]
    if not measured:
        raise ValueError(f"files must have a benchmark; got none in {', '.join(map(str, paths))}")
    by_group: dict[str, list[dict[str, Any]]] = {}
    for run in measured:
        for benchmark in run["benchmarks"]:
            by_group.setdefault(benchmark["group"] or "benchmarks", []).append(benchmark)
    return Report(
        _made_by(measured, command),
        [_group(title, benchmarks) for title, benchmarks in by_group.items()],
        {name: why for run in runs for name, why in run.get("not_measured", {}).items()},
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"files must be JSON of pytest-benchmark; got {path}: {error}") from None
    benchmarks = run.get("benchmarks") if isinstance(run, dict) else None
    if not isinstance(benchmarks, list) or not all("stats" in each for each in benchmarks):
        raise ValueError(f"files must be JSON of pytest-benchmark; got {path} without benchmarks")
    return run


def _made_by(runs: Sequence[dict[str, Any]], command: str | None) -> dict[str, str]:
    run = runs[0]
    machine, commit = run["machine_info"], run["commit_info"]
    extras = (benchmark["extra_info"] for run in runs for benchmark in run["benchmarks"])
    extra = next((extra for extra in extras if "device" in extra), {})
    cpu = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpu']['count']} cores"
    device = extra.get("device", "cpu")
    made_by = {
        "command": command,
        "device": cpu if device == "cpu" else device,
        "host": None if device == "cpu" else cpu,
        "threads": extra.get("threads"),
        "seed": extra.get("seed"),
        "revlib": extra.get("revlib"),
        "torch": extra.get("torch"),
        "python": machine["python_version"],
        "system": f"{machine['system']} {machine['machine']}",
        "date": run["datetime"][:10],
        "commit": commit["id"][:10] + (" and changes since" if commit.get("dirty") else ""),
    }
    if commit["id"] == "unversioned":
        del made_by["commit"]
    return {name: str(value) for name, value in made_by.items() if value is not None}


def _group(title: str, benchmarks: list[dict[str, Any]]) -> Group:
    parameters = [benchmark["params"] or {} for benchmark in benchmarks]
    axis = next((name for name in parameters[0] if _is_axis(name, parameters)), None)
    rows = []
    for benchmark, settings in zip(benchmarks, parameters, strict=True):
        names = [str(value) for name, value in settings.items() if name != axis]
        name = ", ".join(names) or benchmark["name"].partition("[")[0]
        if "UNSERIALIZABLE" in name:  # pytest-benchmark's word for a class or a function
            name = benchmark["param"]
        rows.append(Row(name, settings.get(axis), dict(_values(benchmark))))
    return Group(title, axis, rows)


def _is_axis(name: str, parameters: list[dict[str, Any]]) -> bool:
    values = {settings.get(name) for settings in parameters}
    return len(values) > 1 and all(type(value) is int for value in values)


def _values(benchmark: dict[str, Any]) -> Iterator[tuple[str, Value]]:
    extra, stats = benchmark["extra_info"], benchmark["stats"]
    if "peak_bytes" in extra:
        yield PEAK, extra["peak_bytes"]["activations"] / MIB
    if "saved_bytes" in extra:
        yield SAVED, extra["saved_bytes"]["activations"] / MIB
    if stats["rounds"] > 1:  # a single round is not there for its time
        for name, ratios in extra.get("time_ratios", {}).items():
            q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
            yield f"time / {name}", Ratio(median, q1, q3)
        yield TIME, 1000 * stats["median"]
    for name, value in extra.items():
        if name not in _NO_VALUES and isinstance(value, int | float | str):
            yield name.replace("_", " "), value
    if "peak_bytes" in extra:
        kinds = ("parameters", "gradients", "optimizer_state")
        yield OTHER, sum(extra["peak_bytes"][kind] for kind in kinds) / MIB
    if extra.get("replay_state_bytes"):
        yield "replay state, MiB", extra["replay_state_bytes"] / MIB
