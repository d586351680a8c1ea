"""The examples on the pages run as they stand, and save the memory that the pages speak of."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_benchmarking import Rounds
from torch import nn
from torch.distributions import MultivariateNormal

from revlib import ReversibleSequential
from revlib.memory import measure_step

README = Path(__file__).parent.parent / "README.md"
FLOWS = README.parent / "docs" / "flows.md"
EXACTNESS = README.parent / "docs" / "exactness.md"


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("example", examples(README))
def test_every_example_of_the_readme_runs(example):
    # What some of them say of the reader's own model.
    names = {"x": torch.randn(4, 3), "y": torch.arange(4), "loss": nn.functional.cross_entropy}
    names |= {"model": nn.Linear(3, 5), "MyModel": lambda: nn.Conv2d(3, 1, 1)}

    exec(compile(example, "README.md", "exec"), names)
    if "test_step" in names:
        names["test_step"](Rounds())


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(2, 8)))]
)
def test_the_example_of_images_from_their_features_holds_for_any_seed(seed):
    (example,) = (code for code in examples(README) if "irevnet" in code)

    torch.manual_seed(seed)
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_first_example_prints_what_it_says_and_its_memory_is_flat(capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    said = re.search(r"# (.*), then (.*)", example).groups()
    assert tuple(capsys.readouterr().out.splitlines()) == said
    model = names["model"]
    (chain,) = (part for part in model if isinstance(part, ReversibleSequential))
    x = torch.randn(2, 3, 32, 32)

    def peak() -> int:
        return measure_step(lambda: model(x).sum().backward(), model=model).peak.activations

    deep = peak()
    del chain[5:]

    assert peak() == deep


def test_the_example_of_fused_ops_rebuilds_the_input():
    (example,) = (code for code in examples(README) if "functional.affine" in code)
    given = torch.randn(16, 6, 32, 32)
    names = {}

    torch.manual_seed(0)  # as before this test
    exec(compile(example, "README.md", "exec"), names)

    torch.testing.assert_close(names["x"], given, rtol=1e-4, atol=1e-5)


def test_the_example_of_flows_trains_and_draws():
    (example,) = (code for code in examples(README) if "flows.glow" in code)
    names = {}

    exec(compile(example, "README.md", "exec"), names)

    assert names["samples"].shape == (4, 3, 16, 16)
    assert all(p.grad is not None for p in names["flow"].parameters())


@pytest.mark.slow
def test_the_examples_of_the_page_on_flows_run_in_order_and_its_figures_are_right():
    names = {}

    for example in examples(FLOWS):
        exec(compile(example, "flows.md", "exec"), names)

    held_out = names["ring"](1000)
    trained = names["trained"].log_prob(held_out).mean()
    assert (
        trained > MultivariateNormal(held_out.mean(0), held_out.T.cov()).log_prob(held_out).mean()
    )
    rows = re.findall(
        r"^\| (store|recompute|rebuild) \| (.*?) \| (.*) \|$", FLOWS.read_text(), re.M
    )
    assert len(rows) == 6
    for policy, loss, figures in rows:
        for steps, figure in zip((4, 8, 16), figures.split(" | "), strict=True):
            assert f"{names['peak'](policy, loss, steps):.2f}" == figure, (policy, loss, steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_examples_of_the_page_on_exactness_run_in_order_and_print_what_it_says(capsys):
    names, printed = {}, []

    for example in examples(EXACTNESS):
        exec(compile(example, "exactness.md", "exec"), names)
        printed += re.findall(r"print\(.*\)  # (.*?)(?: \.\.\.)?$", example, re.M)

    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(printed) == 4
    for line, promised in zip(told, printed, strict=True):
        assert line.startswith(promised) or promised.endswith("or so")


@pytest.mark.slow  # the results do not go where the tests of the installed package run
def test_the_errors_on_the_page_on_exactness_are_those_of_its_results():
    page = EXACTNESS.read_text()
    path = re.search(r"\[All tables\]\(\.\./(.*?)\.md\)", page)[1]
    results = json.loads((README.parent / f"{path}.json").read_text())
    measured = set()
    for group in results["groups"]:
        by_row = {}
        for row in sorted(group["rows"], key=lambda row: row["position"] or 0):
            for kind, value in row["values"].items():
                if kind.startswith("error"):
                    by_row.setdefault((row["name"], kind), []).append(value)
        for (name, kind), values in by_row.items():
            figures = " | ".join("**0**" if v == 0 else f"{v:.1e}" for v in values)
            measured.add((kind.rpartition(", ")[2], name, figures))
    rows = re.findall(r"^\| (float32|bf16 autocast): (.*?) \| (.*) \|$", page, re.M)
    names = {
        "stored, from float64": "store, from float64",
        "float, anchored every 32 layers": "float, anchored every 32",
        "MemCNN 1.5.2": "memcnn==1.5.2",
        "RevTorch 0.2.4": "revtorch==0.2.4",
    }

    assert len(rows) == 12 + 10
    for precision, name, figures in rows:
        assert (precision, names.get(name, name), figures) in measured


def test_the_figures_of_flows_are_those_of_their_page():
    rows = re.findall(r"^\| (likelihood|reverse KL), (.*?) \| (.*) \|$", README.read_text(), re.M)

    assert len(rows) == 4
    for loss, kept, figures in rows:
        policy = {"stored": "store", "rebuilt": "rebuild"}[kept]
        assert f"| {policy} | {loss} | {figures} |" in FLOWS.read_text()
