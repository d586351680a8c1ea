"""What anchors cost in a deep float chain, and the error that they leave, beside an exact chain.

Run:    make bench-exact DATA=cifar10.npz
"""

import pytest
import torch
from torch import nn

import revlib
from benchmarks.exact_chains import CHANNELS, gradients_of, make_blocks
from benchmarks.exact_errors import PRECISIONS, worst_error
from revlib import ReversibleSequential
from revlib.benchmarking import measure
from revlib.benchmarking.records import ERROR

DEPTH = 256
EVERY = [4, 8, 16, 32, 64, 128]
METHODS = [
    "store", "float", *(f"float, anchored every {every}" for every in reversed(EVERY)), "exact"
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


def build(blocks: list[nn.Module], method: str) -> ReversibleSequential:
    policy = "store" if method == "store" else "rebuild"
    if "every" in method:
        policy = revlib.anchored(len(blocks), every=int(method.rpartition(" ")[2]))
    return ReversibleSequential(*blocks, policy=policy, exact=method == "exact")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group=f"anchors in an additive chain of {DEPTH} blocks")
def bench_anchors(benchmark, method, quick, rounds):
    blocks = make_blocks(8 if quick else DEPTH, nn.SiLU)
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    chain, rebuilt = build(blocks, method), build(blocks, "float")
    stored = ReversibleSequential(*blocks, policy="store", exact=chain.exact)

    for precision, dtype in PRECISIONS.items():
        got, want = (gradients_of(model, blocks, x, dtype) for model in (chain, stored))
        benchmark.extra_info[f"{ERROR}, {precision}"] = worst_error(got, want)
    measure(
        benchmark,
        lambda: gradients_of(chain, blocks, x),
        model=chain,
        against={"float": lambda: gradients_of(rebuilt, blocks, x)},
        rounds=max(1, rounds // 2),
    )
