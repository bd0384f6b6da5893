"""The optimizer step as one pass over memory on a GPU: the equations once more, for torch.compile to fuse.

Sizes are dynamic and all numbers come in as a tensor, so one compilation per rule and dtype serves every tensor and
every lr and λ. Here θ is read and compared in full, as the readable step does; skipping cache lines is for CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fused import without_gaps

NAMES = [
    "LOW0",
    "HIGH0",
    "DELTA0",
    "LOW",
    "HIGH",
    "DELTA",
    "LR",
    "BETA1",
    "BETA2",
    "EPS",
    "ROOT",
    "PACE",
    "DECAY",
    "SIGN",
]
LOW0, HIGH0, DELTA0, LOW, HIGH, DELTA, LR, BETA1, BETA2, EPS, ROOT, PACE, DECAY, SIGN = range(len(NAMES))


def supports(p: Tensor) -> bool:
    """Whether one pass can work on `p`: floating point on a GPU, without gaps."""
    return p.device.type == "cuda" and p.is_floating_point() and without_gaps(p)


def flat(t: Tensor) -> Tensor:
    """The entries of a tensor without gaps, in the order of memory."""
    return t.detach().as_strided((t.numel(),), (1,))


def moved(rule: str, x: Tensor, g: Tensor, m: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """The new v (or θ), and the moments along with it."""
    if rule == "PLAIN":
        return x - c[LR] * g
    if rule == "PAPER":
        m.copy_(c[BETA1] * m + (1 - c[BETA1]) * c[LR] * g)
        return x - m
    if rule == "SGD":
        m.copy_(c[BETA1] * m + g)
        return x - c[LR] * m
    if rule == "NESTEROV":
        m.copy_(c[BETA1] * m + g)
        return x - c[LR] * (g + c[BETA1] * m)
    m.copy_(m + (1 - c[BETA1]) * (g - m))
    s.copy_(c[BETA2] * s + (1 - c[BETA2]) * g * g)
    return x + c[PACE] * m / (s.sqrt() / c[ROOT] + c[EPS])


def step(rule: str, primal: bool) -> Callable[..., None]:
    """The update of one flat tensor, for torch.compile; with `primal` there is no v (ProxSGD)."""

    def update(p: Tensor, g: Tensor, v: Tensor, m: Tensor, s: Tensor, c: Tensor) -> None:
        theta = p.to(v.dtype)
        g = c[SIGN] * g.to(v.dtype) + c[DECAY] * theta
        if primal:
            x = moved(rule, theta, g, m, s, c)
            p.copy_(x - torch.minimum(torch.maximum(x, c[LOW]), c[HIGH]))
            return
        expected = c[DELTA0] * (v - torch.minimum(torch.maximum(v, c[LOW0]), c[HIGH0]))
        # Where θ was changed from outside v follows; where it is zero, v keeps what it remembers, a hair inside.
        memory = torch.minimum(torch.maximum(v - expected / c[DELTA0], c[LOW]), c[HIGH])
        end = torch.where(theta > 0, c[HIGH], torch.where(c[LOW] < -c[HIGH], memory, c[LOW]))
        inside = 1 - 4 * torch.finfo(v.dtype).eps
        fresh = torch.where(theta != 0, theta / c[DELTA] + end, inside * memory)
        x = torch.where(expected.to(p.dtype) != p, fresh, v)
        x = moved(rule, x, g, m, s, c)
        v.copy_(x)
        p.copy_(c[DELTA] * (x - torch.minimum(torch.maximum(x, c[LOW]), c[HIGH])))

    return update


@functools.cache
def compiled(rule: str, primal: bool) -> Callable[..., None]:
    return torch.compile(step(rule, primal), dynamic=True, fullgraph=True)


class Numbers:
    """What `Plan` is on the CPU, as far as the optimizers see it: takes their numbers and buffers."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.params, self.states = params, states
        self.columns: dict[str, Any] = {}
        self.asked: Any = None
        self.pointed: dict[str, list[Tensor]] = {}

    def set(self, **columns: Any) -> None:
        self.columns |= columns

    def point(self, column: str, tensors: list[Tensor]) -> None:
        self.pointed[column] = tensors

    def buffer(self, name: str) -> list[Tensor]:
        for p, state in zip(self.params, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=dual_dtype(p))
            elif state[name].stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])
        return [state[name] for state in self.states]

    def count_up(self) -> list[float]:
        return count_up(self.states)

    def run(self, rule: str, primal: bool, grads: list[Tensor]) -> None:
        n = len(self.params)
        rows = [np.broadcast_to(np.asarray(self.columns.get(name, 1.0), float), n) for name in NAMES]
        # One copy to the device for all numbers of the step.
        table = torch.from_numpy(np.stack(rows, 1)).to(self.params[0].device, non_blocking=True)
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            v = torch.empty(1, dtype=dual_dtype(p), device=p.device) if primal else self.pointed["V"][i]
            m = self.pointed["FIRST"][i] if "FIRST" in self.pointed else v
            s = self.pointed["SECOND"][i] if "SECOND" in self.pointed else v
            if g.stride() != p.stride():
                g = torch.empty_like(p).copy_(g)
            compiled(rule, primal)(flat(p), flat(g), flat(v), flat(m), flat(s), table[i].to(v.dtype))


def count_up(states: list[dict[str, Any]]) -> list[float]:
    """k ← k + 1 for every tensor. It lives on the CPU, so that nothing waits for the device."""
    for state in states:
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu() + 1
    return [state["step"].item() for state in states]


def dual_dtype(p: Tensor) -> torch.dtype:
    """The precision of v and of all that moves it: float32 or better."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
