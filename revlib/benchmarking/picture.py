"""Draws the memory of a group of benchmarks, along its axis if it has one, and the time beside."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from revlib.benchmarking.records import PEAK, TIME, Group, Ratio, Row

# Okabe and Ito's colors, which the color-blind can tell apart, but for yellow, which is too
# light for a line: gray and Tol's wine stand in.
_COLORS = tuple("#0072b2 #d55e00 #009e73 #e69f00 #cc79a7 #56b4e9 #7f7f7f #000000 #882255".split())
_MARKERS = ("o", "s", "^", "D", "v", "<", ">")

Looks = dict[str, dict[str, Any]]  # of each name: its color and marker, in both panels


def draw(group: Group) -> Figure | None:
    """Draws a group; returns None if it has no memory to draw."""
    rows = [row for row in group.rows if PEAK in row.values]
    if not rows:
        return None
    names = list(dict.fromkeys(row.name for row in rows))
    looks = {
        name: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(names)
    }
    figure = Figure(figsize=(10, 1.6 + 0.3 * max(len(names), 7)), layout="constrained")
    figure.suptitle(group.title[0].upper() + group.title[1:], x=0.01, ha="left")
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


def _draw_lines(axes: Axes, rows: list[Row], axis: str, looks: Looks) -> None:
    for name, look in looks.items():
        points = sorted((row.position, row.values[PEAK]) for row in rows if row.name == name)
        axes.plot(*zip(*points, strict=True), **look)
    positions = sorted({row.position for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xticks(positions, map(str, positions))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e8eb")
    axes.set_xlabel(axis)
    axes.set_title(PEAK, loc="left", size=10)


def _draw_bars(axes: Axes, rows: list[Row], looks: Looks) -> None:
    peaks = [row.values[PEAK] for row in rows]
    colors = [looks[row.name]["color"] for row in rows]
    bars = axes.barh(range(len(rows)), peaks, height=0.5, color=colors)
    axes.bar_label(bars, fmt="{:.1f}", padding=4)
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
