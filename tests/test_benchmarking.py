"""Measuring a model under pytest-benchmark, and the report of what was found."""

import json
import sys

import pytest

from benchmarks import peers
from revlib.benchmarking import measure, measuring
from revlib.benchmarking.__main__ import main
from revlib.benchmarking.picture import draw
from revlib.benchmarking.records import read
from revlib.benchmarking.report import tabulate, to_markdown

pytest_plugins = "pytester"

USERS_FILE = """
import pytest, torch
from torch import nn
from revlib.benchmarking import measure, measuring

@pytest.mark.parametrize("depth", [1, 2])
def test_step(benchmark, depth):
    model, x = nn.Sequential(*(nn.Tanh() for _ in range(depth))), torch.ones(2**18)
    x.requires_grad_()
    measure(benchmark, lambda: model(x).sum().backward(), model=model, rounds=2)
"""


class Rounds:
    """Stands for pytest-benchmark's fixture, which a test cannot have without its tables."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


def benchmark_json(path, benchmarks, **more):
    """Writes what pytest-benchmark would."""
    filled = [
        {"group": "g", "name": "bench[p]", "params": None, "extra_info": {}, "stats": stats()}
        | benchmark
        for benchmark in benchmarks
    ]
    machine = {"cpu": {"brand_raw": "CPU X", "count": 2}, "python_version": "3", "system": "Linux"}
    run = {
        "machine_info": machine | {"machine": "x86_64"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2020-02-02T02:02:02",
        "benchmarks": filled,
    }
    path.write_text(json.dumps(run | more))
    return path


def stats(rounds=5, median=0.25):
    return {"rounds": rounds, "median": median}


@pytest.mark.slow
def test_three_lines_in_a_users_file_give_a_table_of_memory_and_time(pytester):
    pytester.makepyfile(USERS_FILE)

    outcome = pytester.runpytest_subprocess("--benchmark-json=mine.json")
    report = read([pytester.path / "mine.json"])

    outcome.assert_outcomes(passed=2)
    # 1 MiB for each output, and in backward one for the gradient on either side of a tanh.
    by_depth = {row.position: row.values for row in report.groups[0].rows}
    assert [by_depth[depth]["saved activations, MiB"] for depth in (1, 2)] == [1.0, 2.0]
    assert all(values["time, ms"] > 0 for values in by_depth.values())


def test_memory_is_measured_before_any_round_is_timed():
    calls = []

    measure(
        Rounds(), lambda: calls.append("step"), against={"other": lambda: calls.append("other")}
    )

    assert calls[:2] == ["step", "step"]
    assert calls[2:] == ["other", "step"] * 11


def test_a_machine_that_slows_down_leaves_the_ratios(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(measuring, "perf_counter", lambda: clock)

    def take(seconds):
        nonlocal clock
        clock += seconds * (1 + clock // 10)

    benchmark = Rounds()
    measure(benchmark, lambda: take(2.0), against={"other": lambda: take(1.0)})

    assert benchmark.extra_info["time_ratios"]["other"] == pytest.approx([2.0] * 10, rel=0.2)


def test_a_single_round_counts_as_no_timing(tmp_path):
    path = benchmark_json(tmp_path / "b.json", [{"stats": stats(rounds=1)}])

    assert "time, ms" not in read([path]).groups[0].rows[0].values


def test_a_value_that_one_row_lacks_reads_not_measured(tmp_path):
    benchmarks = [{"extra_info": {"error": 1.5}}, {}]

    (grid,) = tabulate(read([benchmark_json(tmp_path / "b.json", benchmarks)]).groups[0])

    assert grid.lines == [["time, ms", "250.0", "250.0"], ["error", "1.5", "not measured"]]


def test_whole_numbers_of_a_parameter_become_the_columns(tmp_path):
    settings = [{"method": name, "depth": depth} for name in "ab" for depth in (4, 16)]
    path = benchmark_json(tmp_path / "b.json", [{"params": each} for each in settings])

    (grid,) = tabulate(read([path]).groups[0])

    assert grid.header == ["", "depth 4", "depth 16"]
    assert [line[0] for line in grid.lines] == ["a", "b"]


def test_the_report_says_why_a_peer_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "REQUIREMENTS", ["peer==1"])
    monkeypatch.setattr(peers, "install", lambda requirement: "no such version")
    own = benchmark_json(tmp_path / "own.json", [{}])

    peers.main(tmp_path)

    report = read([own, tmp_path / "peer==1.json"])
    assert "- peer==1: no such version" in to_markdown(report, pictures={})


def test_a_command_that_fails_tells_its_last_error():
    assert peers.run([sys.executable, "-c", "raise OSError('no disk')"]) == "OSError: no disk"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON of pytest-benchmark"),
        ("[]", "without benchmarks"),
        ("{}", "without benchmarks"),
        ('{"benchmarks": []}', "must have a benchmark"),
    ],
)
def test_a_file_that_cannot_be_reported_gets_one_line(text, message, tmp_path, monkeypatch):
    (tmp_path / "b.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["revlib.benchmarking", str(tmp_path / "b.json")])

    with pytest.raises(SystemExit, match=message) as raised:
        main()

    assert "\n" not in raised.value.code


def test_the_report_is_named_by_device_and_date(tmp_path, monkeypatch):
    path = benchmark_json(tmp_path / "b.json", [{}])
    monkeypatch.setattr(sys, "argv", ["revlib.benchmarking", str(path)])

    main()

    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "b.json",
        "cpu-x-2020-02-02.json",
        "cpu-x-2020-02-02.md",
    ]


def test_errors_along_an_axis_are_drawn_with_0_below_all_others(tmp_path):
    benchmarks = [
        {
            "params": {"depth": depth, "method": method},
            "extra_info": {"error, float32": error * depth, "other": 1.0},
        }
        for method, error in (("float", 1e-6), ("exact", 0.0), ("lost", float("nan")))
        for depth in (1, 10)
    ]
    (group,) = read([benchmark_json(tmp_path / "a.json", benchmarks)]).groups

    (panel,) = draw(group).axes

    lines = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert panel.get_title(loc="left") == "error, float32"
    names = [label.get_text() for label in panel.get_yticklabels()]
    ticks = dict(zip(names, panel.get_yticks(), strict=True))
    assert lines["float"] == pytest.approx([1e-6, 1e-5])
    assert lines["exact"] == [ticks["0"]] * 2 and ticks["0"] < 1e-6


def test_a_group_without_memory_or_errors_has_no_picture(tmp_path):
    (group,) = read([benchmark_json(tmp_path / "a.json", [{}])]).groups

    assert draw(group) is None


def test_names_with_brackets_and_bars_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    benchmarks = [{"group": "[/names] a|b", "params": {"kind": "[/x] [red]d"}}]
    path = benchmark_json(tmp_path / "a.json", benchmarks)
    monkeypatch.setattr(sys, "argv", ["report", str(path)])

    main()

    assert "[/names] a|b" in (shown := capsys.readouterr().out)
    assert "[/x] [red]d" in shown
    assert "| [/x] [red]d |" in to_markdown(read([path]), {})


def test_a_switch_is_no_axis(tmp_path):
    benchmarks = [{"params": {"compiled": value}} for value in (False, True)]

    (group,) = read([benchmark_json(tmp_path / "a.json", benchmarks)]).groups

    assert group.axis is None
    assert [row.name for row in group.rows] == ["False", "True"]


def test_a_class_is_named_by_its_id(tmp_path):
    benchmarks = [{"params": {"layer": "UNSERIALIZABLE[<class 'ReLU'>]"}, "param": "ReLU"}]

    (group,) = read([benchmark_json(tmp_path / "a.json", benchmarks)]).groups

    assert group.rows[0].name == "ReLU"


def test_the_header_names_the_command_and_leaves_out_a_commit_that_is_not_there(tmp_path):
    path = benchmark_json(tmp_path / "a.json", [{}], commit_info={"id": "unversioned"})

    made_by = read([path], "make bench").made_by

    assert made_by["command"] == "make bench"
    assert "commit" not in made_by


@pytest.mark.parametrize("text", ['{"benchmarks": [{}]}', "[]", "no JSON"])
def test_a_file_that_is_not_pytest_benchmarks_gets_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"files must be JSON of pytest-benchmark; got .*a\.json"):
        read([path])


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path, monkeypatch):
    path = benchmark_json(tmp_path / "a.json", [{}])
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--out", str(path / "below")])

    with pytest.raises(SystemExit, match="Not a directory"):
        main()
