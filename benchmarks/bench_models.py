"""Memory and time of a training step of RevNets, against their ResNet twins.

Run:    make bench
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from revlib.benchmarking import measure
from revlib.models import create_model

TWINS = {"resnet32": "revnet38", "resnet110": "revnet110"}
MODELS = {
    label: (resnet, name, options)
    for resnet, revnet in TWINS.items()
    for label, name, options in (
        (resnet, resnet, {}),
        (f"{revnet}, store", revnet, {"policy": "store"}),
        (revnet, revnet, {}),
    )
}


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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.benchmark(group="models")
def bench_training_step(benchmark, model, device):
    twin_name, name, options = MODELS[model]
    network = create_model(name, **options).to(device)
    twin_step, _ = training_step(create_model(twin_name).to(device))
    step, optimizer = training_step(network)

    measure(
        benchmark, step, model=network, optimizer=optimizer, against=("ResNet twin", twin_step)
    )
