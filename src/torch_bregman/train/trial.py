"""Whether a network and its data go together, told before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import told
from .denoising import denoises


def try_out(name: str, model: nn.Module, x: Tensor, classes: int) -> None:
    """ValueError that says what is wrong with the outputs of `model`, called `name`, on the samples `x`.

    In both modes: some networks have further outputs in training alone.
    """
    for mode in (False, True):
        try:
            with unchanged(model, x.device), torch.set_grad_enabled(mode):
                out: Any = model.train(mode)(x)
        except Exception as error:
            raise ValueError(
                f"Invalid `model`: {name!r} fails on samples of shape {list(x.shape[1:])}: {told(error)}"
            ) from error
        if problem := wrong(out, x, None if denoises(model) else classes):
            where = "training" if mode else "eval"
            raise ValueError(f"Invalid `model`: {name!r} in {where} mode, on {len(x)} samples, returns {problem}.")
        if mode and not out.requires_grad:
            raise ValueError(
                f"Invalid `model`: {name!r} returns what no parameter can change: all that it depends on is frozen or "
                "detached."
            )


def wrong(out: Any, x: Tensor, classes: int | None) -> str:
    """What `out` is and should be: logits of at least so many classes, or without classes like `x`; else nothing."""
    wanted = f"logits [{len(x)}, {classes}]" if classes is not None else f"the shape of its input, {list(x.shape)}"
    if not isinstance(out, Tensor):
        inside = f" of {', '.join(map(str, out))}" if isinstance(out, dict) else ""
        return f"a {type(out).__name__}{inside}; expected one tensor, {wanted}"
    if not out.is_floating_point():
        return f"{out.dtype}; expected floating point numbers, {wanted}"
    if classes is None:
        return "" if out.shape == x.shape else f"the shape {list(out.shape)}; expected {wanted}"
    if out.dim() != 2 or len(out) != len(x):
        return f"the shape {list(out.shape)}; expected {wanted}"
    # More outputs than classes are harmless: a head of a larger task.
    return "" if out.shape[1] >= classes else f"{out.shape[1]} outputs for {classes} classes; expected {wanted}"


def least_samples(model: nn.Module, x: Tensor) -> int:
    """How many samples a step needs: 2 where a batch norm has one value per channel of a single one, else 1."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return 1
    try:
        with unchanged(model, x.device):
            model.train()(x[:1])
    except ValueError:  # torch's "Expected more than 1 value per channel when training"
        return 2
    return 1


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A pass without gradients, after which mode, buffers and random numbers are those of before."""
    training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.train(training)
            for buffer, before in buffers:
                buffer.copy_(before)


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the inputs of `model` are to be: float32, or what its parameters are."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
