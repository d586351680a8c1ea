"""The README's example runs as it stands, and saves the memory that the page speaks of."""

import re
from pathlib import Path

import torch

from revlib import ReversibleSequential
from revlib.memory import measure_step

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_runs_and_its_memory_is_flat():
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    model = names["model"]
    (chain,) = (part for part in model if isinstance(part, ReversibleSequential))
    x = torch.randn(2, 3, 32, 32)

    def peak() -> int:
        return measure_step(lambda: model(x).sum().backward(), model=model).peak.activations

    deep = peak()
    del chain[5:]

    assert peak() == deep


def test_the_example_of_fused_ops_rebuilds_the_input():
    pattern = r"```python\n(from revlib import functional.*?)```"
    example = re.search(pattern, README.read_text(), re.DOTALL)[1]
    given = torch.randn(16, 6, 32, 32)
    names = {"torch": torch}

    torch.manual_seed(0)  # as before this test
    exec(compile(example, "README.md", "exec"), names)

    torch.testing.assert_close(names["x"], given, rtol=1e-4, atol=1e-5)
