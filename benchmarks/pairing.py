"""By how much methods differ that were trained under the same seeds: what seeds share cancels."""

import statistics

from revlib.benchmarking.records import Report, Row

# What the value of each seed is called, in front of its number.
OF_SEED = "  of seed "


def add_differences(report: Report, reference: str) -> None:
    """Adds the differences from a method to the rows of all groups that it has values in."""
    for group in report.groups:
        found = {row.name: values_by_seed(row) for row in group.rows}
        base = found.get(reference)
        for row in group.rows if base else ():
            differences = {
                seed: value - base[seed] for seed, value in found[row.name].items() if seed in base
            }
            if len(differences) < 2:
                continue
            mean = statistics.mean(differences.values())
            error = statistics.stdev(differences.values()) / len(differences) ** 0.5
            row.values[f"minus {reference}, mean ± standard error"] = f"{mean:+.4f} ± {error:.4f}"
            for seed, difference in differences.items():
                row.values[f"  minus {reference}, seed {seed}"] = f"{difference:+.4f}"


def values_by_seed(row: Row) -> dict[int, float]:
    return {
        int(name.removeprefix(OF_SEED)): float(value)
        for name, value in row.values.items()
        if name.startswith(OF_SEED)
    }
