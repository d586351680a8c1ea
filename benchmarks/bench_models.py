"""Memory and time of a training step of RevNets and their ResNet twins.

Run:    make bench
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from revlib.benchmarking import measure
from revlib.models import create_model


def family(resnet: str, revnet: str) -> dict[str, Callable[[], nn.Module]]:
    return {
        resnet: partial(create_model, resnet),
        f"{revnet}, store": partial(create_model, revnet, policy="store"),
        revnet: partial(create_model, revnet),
    }


FAMILIES = [family("resnet32", "revnet38"), family("resnet110", "revnet110")]
FAMILY_OF = {model: family for family in FAMILIES for model in family}


def training_step(model: nn.Module) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(32, 3, 32, 32, device=device)
    labels = torch.randint(10, (32,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, optimizer


@pytest.mark.parametrize("model", FAMILY_OF)
@pytest.mark.benchmark(group="models")
def bench_training_step(benchmark, model, device):
    builders = FAMILY_OF[model]
    resnet, stored, _ = (training_step(build().to(device))[0] for build in builders.values())
    network = builders[model]().to(device)
    step, optimizer = training_step(network)

    measure(
        benchmark,
        step,
        model=network,
        optimizer=optimizer,
        against={"ResNet twin": resnet, "RevNet stored": stored},
    )
