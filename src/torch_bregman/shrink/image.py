"""What removed channels contribute where that depends on the position."""

from __future__ import annotations

from torch import Tensor, fx, nn


@fx.wrap
def add_image(x: Tensor, image: Tensor) -> Tensor:
    """In place."""
    if x.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"A layer returns {tuple(x.shape[1:])} per sample; the network was made smaller for inputs that give "
            f"{tuple(image.shape[1:])}."
        )
    return x.add_(image)


class AddImage(nn.Module):
    """x + what removed channels contribute, [1, channels, *positions]: memory formats reach four dimensions only."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image)
        self.image: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return add_image(x, self.image)
