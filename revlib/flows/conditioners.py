"""Temporary: sub-networks of couplings."""

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, c_in, c_out, hidden=(64, 64), context_features=0):
        super().__init__()
        sizes = [c_in + context_features, *hidden]
        layers = []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], c_out))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, context=None):
        return self.net(x if context is None else torch.cat((x, context), 1))


class GlowConvNet(nn.Module):
    def __init__(self, c_in, c_out, hidden=512, context_channels=0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(c_in, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, c_out, 3, padding=1),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, context=None):
        return self.net(x)


class ResidualConvNet(GlowConvNet):
    def __init__(self, c_in, c_out, hidden=64, blocks=2, context_channels=0):
        super().__init__(c_in, c_out, hidden)
