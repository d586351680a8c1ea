"""Shows the figures of benchmarks: as tables in a terminal, and in files to keep."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revlib.benchmarking.picture import draw
from revlib.benchmarking.records import Group, Ratio, Report, Value

_METHOD = (
    "Memory is measured in a pass of its own. Peak activations are the most bytes alive at once "
    "in a step; saved ones are what autograd keeps for backward, not what a library keeps past "
    "it. Neither counts the step's input, nor parameters, gradients and optimizer state, which "
    "are the other memory. A time is the median over the rounds. A time ratio is of two steps "
    "that ran in turn: the median over the rounds ± half the distance between the quartiles."
)


@dataclass(frozen=True)
class Grid:
    """A table that has no form yet: what stands above it, over its columns and in its lines."""

    title: str
    header: list[str]
    lines: list[list[str]]


def tabulate(group: Group) -> list[Grid]:
    """Lays out a group: along an axis one table for each kind of value, otherwise one of all."""
    kinds = list(dict.fromkeys(kind for row in group.rows for kind in row.values))
    names = list(dict.fromkeys(row.name for row in group.rows))
    if group.axis is None or len(names) == 1:
        columns = [
            row.name if group.axis is None else f"{group.axis} {row.position}"
            for row in group.rows
        ]
        lines = [[kind, *(_text(row.values.get(kind)) for row in group.rows)] for kind in kinds]
        table = [["", *columns], *lines]
        if len(columns) > len(kinds):
            table = [list(column) for column in zip(*table, strict=True)]
        return [Grid(group.title, table[0], table[1:])]
    positions = sorted({row.position for row in group.rows})
    columns = [f"{group.axis} {position}" for position in positions]
    cells = {(row.name, row.position): row.values for row in group.rows}
    grids = []
    for kind in kinds:
        lines = [
            [name, *(_text(cells.get((name, position), {}).get(kind)) for position in positions)]
            for name in dict.fromkeys(row.name for row in group.rows if kind in row.values)
        ]
        grids.append(Grid(kind, ["", *columns], lines))
    return grids


def to_terminal(report: Report, console: Console) -> None:
    """Prints the tables."""
    for group in report.groups:
        console.rule(Text(group.title), align="left")
        for grid in tabulate(group):
            title = None if grid.title == group.title else Text(grid.title)
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            for name in grid.header:
                side = "right" if name else "left"
                table.add_column(Text(name), justify=side, no_wrap=not name, overflow="fold")
            for line in grid.lines:
                table.add_row(*map(Text, line))
            console.print(table)
    for name, why in report.not_measured.items():
        console.print(f"not measured: {name}: {why}", markup=False)


def to_markdown(report: Report, pictures: dict[str, Path]) -> str:
    """Returns the tables, with the pictures of the groups that have one."""
    paragraphs = [
        "# Memory and time of training steps",
        _bullets(report.made_by.items()),
        _METHOD,
    ]
    for group in report.groups:
        paragraphs.append(f"## {group.title[0].upper()}{group.title[1:]}")
        if group.title in pictures:
            paragraphs.append(f"![{group.title}]({pictures[group.title].name})")
        for grid in tabulate(group):
            if grid.title != group.title:
                paragraphs.append(f"### {grid.title[0].upper()}{grid.title[1:]}")
            rule = ["---", *["---:"] * (len(grid.header) - 1)]
            lines = [grid.header, rule, *grid.lines]
            paragraphs.append("\n".join(map(_markdown_line, lines)))
    if report.not_measured:
        paragraphs += ["## Not measured", _bullets(report.not_measured.items())]
    return "\n\n".join(paragraphs) + "\n"


def write(report: Report, out: Path) -> list[Path]:
    """Writes Markdown, JSON and pictures, under names of the device and the date."""
    out.mkdir(parents=True, exist_ok=True)
    stem = _slug(f"{report.made_by['device'].partition(',')[0]} {report.made_by['date']}")
    pictures = {}
    for group in report.groups:
        picture = draw(group)
        if picture is not None:
            pictures[group.title] = out / f"{stem}-{_slug(group.title)}.png"
            picture.savefig(pictures[group.title], dpi=160)
    markdown, js = out / f"{stem}.md", out / f"{stem}.json"
    markdown.write_text(to_markdown(report, pictures))
    js.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return [markdown, js, *pictures.values()]


def _bullets(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in pairs)


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _text(value: Value | None) -> str:
    match value:
        case None:
            return "not measured"
        case str():
            return value
        case Ratio(median, q1, q3):
            return f"{median:.2f} ± {(q3 - q1) / 2:.2f}"
        case _ if value == 0 or 0.001 <= value < 10:
            return f"{value:.3g}"
        case _ if 10 <= value < 1e6:
            return f"{value:,.1f}"
        case _:
            return f"{value:.1e}"
