"""The shape of a sample."""

from __future__ import annotations

Shape = tuple[int, ...]


def image_shape(model: str, shape: Shape) -> tuple[int, int, int]:
    """(channels, height, width), or ValueError where a sample is no image."""
    if len(shape) != 3:
        raise ValueError(f"Model {model!r} needs images [channels, height, width]; the samples have shape {shape}.")
    return shape[0], shape[1], shape[2]
