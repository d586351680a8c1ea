"""Whole training steps that are timed with kernels on and off: a Glow and a RevNet."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from revlib.flows import glow
from revlib.models import create_model

Step = Callable[[], None]


def glow_step(device: torch.device, autocast: bool, small: bool) -> Step:
    """One level of Glow, 16 steps of flow on 64x64 images, with conditioners of 128 channels."""
    steps, hidden, size, batch = (2, 4, 8, 2) if small else (16, 128, 64, 128)
    flow = glow((3, size, size), levels=1, steps=steps, hidden=hidden).to(device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, size, size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = flow.bits_per_dim(images)
        loss.backward()
        optimizer.step()

    return step


def revnet_step(device: torch.device, autocast: bool, small: bool) -> Step:
    """RevNet-110 on images of CIFAR-10's size. Its couplings are additive: none is a kernel."""
    model = create_model("revnet38" if small else "revnet110").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(2 if small else 128, 3, 32, 32, device=device)
    labels = torch.randint(10, (len(images),), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[..., Step]] = {
    f"{name} step, {precision}": partial(make, autocast=autocast)
    for name, make in (("Glow", glow_step), ("RevNet", revnet_step))
    for precision, autocast in (("float32", False), ("bfloat16 autocast", True))
}
