"""A layer used the other way round."""

from torch import Tensor

from revlib.evaluate import Evaluate, Replay
from revlib.flows.layer import FlowLayer
from revlib.replay import is_altered
from revlib.streams import Form, Streams


class Inverse(FlowLayer):
    """Goes from data to latent by a layer's `inverse`, and back by its `forward`.

    Args:
        layer: A layer, or a chain in which nothing is factored out.

    Shape:
        That of `layer`.

    Example:
        >>> layer = revlib.flows.AffineCoupling(nn.Linear(2, 4))
        >>> x = torch.randn(3, 4)
        >>> torch.equal(revlib.flows.Inverse(layer)(x)[0], layer.inverse(x)[0])
        True
    """

    def __init__(self, layer: FlowLayer) -> None:
        super().__init__()
        if not isinstance(layer, FlowLayer):
            raise TypeError(f"layer must be a FlowLayer; got {type(layer).__name__}")
        if layer.n_latents:
            raise ValueError(
                f"layer must not factor out latents; {type(layer).__name__} factors out "
                f"{layer.n_latents}"
            )
        self.layer = layer

    @property
    def form(self) -> Form:
        return "whole" if self._is_whole else self.layer.form

    @property
    def cheap_inverse(self) -> bool:
        return self.layer.cheap_forward

    @property
    def cheap_forward(self) -> bool:
        return self.layer.cheap_inverse

    @property
    def can_be_exact(self) -> bool:
        return self.layer.can_be_exact and not self._is_whole

    @property
    def _methods(self) -> type[FlowLayer]:
        return self.layer.contract if self._is_whole else type(self.layer)

    @property
    def _is_whole(self) -> bool:
        return not self.layer.on_streams or is_altered(self.layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(z, context)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._methods.inverse_streams(self.layer, streams, evaluate)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._methods.forward_streams(self.layer, streams, evaluate)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._methods.inverse_backward_streams(self.layer, outputs, gradients, evaluate)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._methods.backward_streams(self.layer, outputs, gradients, evaluate)
