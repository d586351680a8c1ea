"""Whole training steps that are timed with kernels on and off: a Glow and a RevNet."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import functional
from revlib.models import create_model

Step = Callable[[], None]


class GlowStep(nn.Module):
    """ActNorm, an invertible 1x1 convolution and an affine coupling, as in Glow.

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q)
        self.conditioner = nn.Sequential(
            nn.Conv2d(channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, norm_log_det = functional.actnorm(x, self.log_scale, self.bias)
        x = F.conv2d(x, self.weight[:, :, None, None])
        pixels = x.shape[2] * x.shape[3]
        mixing_log_det = pixels * torch.linalg.slogdet(self.weight.double()).logabsdet.float()
        kept, moved = x.chunk(2, 1)
        moved, log_det = functional.affine_coupling(moved, self.conditioner(kept), scale="sigmoid")
        return torch.cat((kept, moved), 1), norm_log_det + mixing_log_det + log_det


class Glow(nn.Module):
    """One level of Glow: the log-probability of images."""

    def __init__(self, depth: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(GlowStep(12, hidden) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.squeeze(images)
        total = images.new_zeros(len(images))
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return total + functional.gaussian_log_prob(x)


def glow_step(device: torch.device, autocast: bool, small: bool) -> Step:
    """Sixteen steps of flow on 64x64 images, with conditioners of 128 channels."""
    model = Glow(*(2, 4) if small else (16, 128)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images = torch.randn(2 if small else 128, 3, *(8, 8) if small else (64, 64), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = -model(images).mean() / images[0].numel()
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
