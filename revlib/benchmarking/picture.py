"""Draws a group of benchmarks: memory, along its axis if it has one, and the time beside.

Errors along an axis are drawn where no memory was measured.
"""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from revlib.benchmarking.records import ERROR, PEAK, TIME, Group, Ratio, Row

# Okabe and Ito's colors, which the color-blind can tell apart, but for yellow, which is too
# light for a line: gray and Tol's wine stand in.
_COLORS = tuple("#0072b2 #d55e00 #009e73 #e69f00 #cc79a7 #56b4e9 #7f7f7f #000000 #882255".split())
_MARKERS = ("o", "s", "^", "D", "v", "<", ">")

Looks = dict[str, dict[str, Any]]  # of each name: its color and marker, in both panels


def draw(group: Group) -> Figure | None:
    """Draws a group; returns None if it has neither memory nor errors to draw."""
    rows = [row for row in group.rows if PEAK in row.values]
    errors = {kind: None for row in group.rows for kind in row.values if kind.startswith(ERROR)}
    if rows:
        return _draw_memory(group, rows)
    if errors and group.axis is not None:
        return _draw_errors(group, list(errors))
    return None


def _draw_memory(group: Group, rows: list[Row]) -> Figure:
    looks = _looks_of(rows)
    figure = Figure(figsize=(10, 1.6 + 0.3 * max(len(looks), 7)), layout="constrained")
    _entitle(figure, group)
    memory, time = figure.subplots(1, 2, sharey=group.axis is None)
    if group.axis is None:
        _draw_bars(memory, rows[::-1], looks)
        _draw_times(time, rows[::-1], looks)
    else:
        _draw_lines(memory, rows, group.axis, looks)
        end = max(row.position for row in rows)
        last = [row for row in rows if row.position == end]
        # From the bottom up in the order in which the lines end: the names stand beside them.
        _draw_times(time, sorted(last, key=lambda row: row.values[PEAK]), looks)
        time.set_title(f"{time.get_title('left')}, {group.axis} {end}", loc="left", size=10)
    for axes in (memory, time):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_errors(group: Group, kinds: list[str]) -> Figure:
    """Draws a panel for each kind of error, two in a row, with 0 below what is not."""
    values = [row.values.get(kind, 0) for row in group.rows for kind in kinds]
    exponents = [math.floor(math.log10(v)) for v in values if 0 < v < math.inf] or [0]
    zero = 10.0 ** (min(exponents) - 2)
    looks = _looks_of(group.rows)
    n_lines = -(-len(kinds) // 2)
    figure = Figure(figsize=(10, 1.2 + 3 * n_lines), layout="constrained")
    _entitle(figure, group)
    panels = figure.subplots(n_lines, min(len(kinds), 2), sharex=True, sharey=True, squeeze=False)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for name, look in looks.items():
            found = [r for r in group.rows if r.name == name and kind in r.values]
            points = [(row.position, row.values[kind] or zero) for row in found]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), **look, label=name)
        axes.set_title(kind, loc="left", size=10)
        _ticks_along(axes, group.axis, sorted({row.position for row in group.rows}))
        axes.label_outer()
        axes.set_yscale("log")
        powers = range(min(exponents), max(exponents) + 2, 2)
        names = {zero: "0", **{10.0**p: f"$10^{{{p}}}$" for p in powers}}
        axes.set_yticks(list(names), names.values())
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    labels = {}
    for axes in panels.flat:
        labels |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(labels.values(), labels, loc="outside lower left", ncols=3, frameon=False)
    return figure


def _looks_of(rows: list[Row]) -> Looks:
    names = dict.fromkeys(row.name for row in rows)
    return {
        name: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(names)
    }


def _entitle(figure: Figure, group: Group) -> None:
    figure.suptitle(group.title[0].upper() + group.title[1:], x=0.01, ha="left")


def _ticks_along(axes: Axes, axis: str, positions: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(positions, map(str, positions))
    axes.set_xlabel(axis)
    axes.grid(axis="y", color="#e6e8eb")


def _draw_lines(axes: Axes, rows: list[Row], axis: str, looks: Looks) -> None:
    for name, look in looks.items():
        points = sorted((row.position, row.values[PEAK]) for row in rows if row.name == name)
        axes.plot(*zip(*points, strict=True), **look)
    axes.set_yscale("log", base=2)
    _ticks_along(axes, axis, sorted({row.position for row in rows}))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_title(PEAK, loc="left", size=10)


def _draw_bars(axes: Axes, rows: list[Row], looks: Looks) -> None:
    peaks = [row.values[PEAK] for row in rows]
    colors = [looks[row.name]["color"] for row in rows]
    bars = axes.barh(range(len(rows)), peaks, height=0.5, color=colors)
    axes.bar_label(bars, [f"{p:.1f}" if p >= 1 else f"{p:.2g}" for p in peaks], padding=4)
    axes.margins(x=0.15)
    axes.set_title(PEAK, loc="left", size=10)


def _draw_times(axes: Axes, rows: list[Row], looks: Looks) -> None:
    """Draws ratios with their quartiles if the rows have some, and times otherwise."""
    kinds = [kind for row in rows for kind, value in row.values.items() if type(value) is Ratio]
    kind = kinds[0] if kinds else TIME
    for place, row in enumerate(rows):
        value = row.values.get(kind)
        if value is None:
            continue
        if type(value) is Ratio:
            span = [value.first_quartile, value.third_quartile]
            axes.plot(span, [place, place], color=looks[row.name]["color"])
            value = value.median
        axes.plot(value, place, **looks[row.name])
        text = f"{value:.2f}" if kinds else f"{value:,.1f}"
        axes.annotate(text, (value, place), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.margins(x=0.2, y=0.12)
    axes.set_title(kind, loc="left", size=10)
