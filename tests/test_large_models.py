"""The benchmark of large classifiers: its fake figures are real ones, and what its table says."""

import pytest

from benchmarks.large_models import build, label, step_memory, table


@pytest.mark.parametrize(("name", "policy"), [("resnet32", None), ("revnet38", "store")])
def test_fake_figures_are_those_of_real_tensors(name, policy):
    fake, real = (
        step_memory(lambda: build(name, policy), 2, 32, fake=fake) for fake in (True, False)
    )

    assert fake == real


def test_a_rebuilt_chain_keeps_beside_them_what_its_guard_looks_at():
    fake, real = (
        step_memory(lambda: build("revnet38", "rebuild"), 2, 32, fake=fake)
        for fake in (True, False)
    )

    at_most = 4 * 4096 * 3  # the values of each stretch of rebuilt blocks
    assert 0 < real.saved.activations - fake.saved.activations <= at_most


def test_the_table_has_a_line_per_network_and_policy():
    rows = {label("a", None): {"MiB": 1234.567, "with": "trained"}, label("b", "store"): {}}
    rows["b, store"] = {"MiB": 2, "with": "none"}

    assert table(rows).splitlines() == [
        "|  | MiB | with |",
        "| --- | ---: | ---: |",
        "| a | 1,234.57 | trained |",
        "| b, store | 2 | none |",
    ]
