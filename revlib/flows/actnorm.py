"""Activation normalization, whose first batch decides where it starts."""

import sys

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils import parametrize

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.finite import NonFiniteError, is_finite
from revlib.flows.checks import check_channel_count, check_channels
from revlib.flows.layer import FlowLayer
from revlib.replay import draws_nothing, in_backward
from revlib.streams import Streams

# Of the typical standard deviation of a channel: below it a channel counts as constant.
STEADY = 1e-3
# Of a standard deviation: what `actnorm_init` gives for a constant channel, and a little more.
NOTHING = 2e-6


@draws_nothing
class ActNorm(FlowLayer):
    r"""Scales and shifts each channel; the first batch decides by how much to begin with.

    .. math:: y = x \cdot \exp(s) + b, \qquad \log\left|\det J\right| = n \sum s

    where n is the number of pixels. The first batch that goes forward in training mode sets the
    parameters so that every channel of y has mean 0 and variance 1 over that batch; unless they
    are not 0 any more, because they were trained or loaded. Where `torch.distributed` is in use,
    they are set to the mean over all processes, so that these start alike: all of them must make
    that call. Parameters that `fully_shard` has sharded cannot be set: let a batch pass before.

    Args:
        channels: The number of channels.

    Shape:
        [batch, channels, ...].

    References:
        Glow (Kingma and Dhariwal, 2018), section 3.1, https://arxiv.org/abs/1807.03039

    Example:
        >>> layer = revlib.flows.ActNorm(4)
        >>> z, log_det = layer(5 + 3 * torch.randn(64, 4))
        >>> z.mean().abs().item() < 1e-5, z.var(0, correction=0).round(decimals=3).tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """

    can_be_exact = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_channel_count("ActNorm", channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # Looking at the parameters waits for the GPU, so it is done until they are not 0.
        self._seen_initialized = False

    @property
    def initialized(self) -> bool:
        """Whether the parameters are not 0 any more."""
        return bool(self.log_scale.any() or self.bias.any())

    def weights(self) -> Streams:
        return self.log_scale, self.bias

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, len(self.log_scale))
        self.initialize(x, evaluate)
        weights = evaluate.weights(self)
        if evaluate.exact is not None:
            return evaluate.exact.scale(
                "exact_actnorm", x, *weights, label=evaluate.label, inverse=False
            )
        return functional.actnorm(x, *weights)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(evaluate.label, y, len(self.log_scale))
        weights = evaluate.weights(self)
        if evaluate.exact is not None:
            return evaluate.exact.scale(
                "exact_actnorm", y, *weights, label=evaluate.label, inverse=True
            )
        return functional.actnorm_inverse(y, *weights)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        weights, pullback = evaluate.vjp_weights(self)
        if evaluate.exact is None:
            x, dx, *dweights = functional.actnorm_backward(y, *weights, dy, dlog_det)
        else:
            x, dx, *dweights = evaluate.exact.scale_backward(
                "exact_actnorm", y, *weights, dy, dlog_det, inverse=False
            )
        pullback(dweights)
        return (x,), (dx,)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        weights, pullback = evaluate.vjp_weights(self)
        if evaluate.exact is None:
            y, dy, *dweights = functional.actnorm_inverse_backward(x, *weights, dx, dlog_det)
        else:
            y, dy, *dweights = evaluate.exact.scale_backward(
                "exact_actnorm", x, *weights, dx, dlog_det, inverse=True
            )
        pullback(dweights)
        return (y,), (dy,)

    @torch.no_grad()
    def initialize(self, x: Tensor, evaluate: Evaluate) -> None:
        """Sets the parameters from `x`, if this is the batch that decides."""
        if self._seen_initialized or not self.training or not len(x):
            return
        if torch.compiler.is_compiling():
            # Whether parameters are 0 is for Python to see: with fullgraph=True an error says so.
            torch._dynamo.graph_break(
                msg=f"{evaluate.label}: ActNorm is to be set by its first batch; let a batch pass "
                "before torch.compile, load a checkpoint, or call eval()"
            )
        if in_backward() or x.is_meta or isinstance(x, FakeTensor):
            return
        if not self.initialized:
            log_scale, bias = map(mean_over_processes, first_parameters(x))
            if not is_finite(log_scale, bias):
                raise NonFiniteError(
                    f"{evaluate.label}: ActNorm cannot start from a batch that is not finite"
                )
            for name, value in (("log_scale", log_scale), ("bias", bias)):
                if parametrize.is_parametrized(self, name):
                    setattr(self, name, value)
                else:
                    getattr(self, name).copy_(value)
        self._seen_initialized = self.initialized

    def extra_repr(self) -> str:
        return f"channels={len(self.log_scale)}"

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_initialized = not self.log_scale.is_meta and self.initialized


def first_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-scales and biases that normalise a batch.

    A channel that hardly varies in it may vary in the next one, so it is scaled as the channels
    are on the whole. Where none varies, as in a batch of one vector, the result is 0.
    """
    log_scale, bias = functional.actnorm_init(x)
    std, mean = (-log_scale).exp(), -bias * (-log_scale).exp()
    typical = std.square().mean().sqrt()
    std = torch.where(std < STEADY * typical, typical, std)
    return tuple(torch.where(typical <= NOTHING, 0, t) for t in (-std.log(), -mean / std))


def mean_over_processes(value: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value


def refuse_sharded_start(module: nn.Module) -> None:
    """Raises if a module that `fully_shard` has sharded holds an ActNorm without parameters yet.

    What would be written to the gathered parameters never reaches the shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded if not imported
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return
    for name, part in module.named_modules():
        if isinstance(part, ActNorm) and part.training and not part.initialized:
            raise RuntimeError(
                f"{name} (ActNorm) is to be set by the first batch, but fully_shard has sharded "
                "its parameters; let a batch pass before fully_shard, or load a checkpoint"
            )
