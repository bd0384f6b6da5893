"""The usual ways to a sparse network, to compare with under the same budget and at the same density.

.. code-block:: python

    optimizer = torch.optim.Adam(model.parameters())
    rival = RigL(model, density=0.05, total_steps=len(loader) * epochs, optimizer=optimizer)
    ...
    optimizer.step()
    rival.step()

Each works with any optimizer of torch, on the weights that `tb.density` counts, and ends with exactly
round(density·n) of them, at least one. What is masked is zeroed after every step. The optimizer still sees the
gradients of masked weights: their averages (momentum, Adam's moments) go on and never leak, for they are of single
entries, and they start anew where a weight comes back. Only what mixes entries, as gradient clipping does, notices it.

[ERK, RigL] Evci, Gale, Menick, Castro, Elsen, Rigging the Lottery, ICML 2020, arXiv 1911.11134.
[GMP] Zhu, Gupta, To prune, or not to prune, 2017, arXiv 1710.01878.
[SET] Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, Nature Communications 9:2383, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .choices import choose
from .density import check_density
from .distributed import count_nonzero
from .layers import weight_layers
from .optim.options import check_number

#: Where a new weight starts instead of at 0: no sum notices it, and counts of non-zeros are those of the masks.
ALMOST_ZERO = 1e-20

# ---------------------------------------------------------------------- how many weights each layer gets


def uniform(shapes: Sequence[Sequence[int]], kept: int) -> list[int]:
    """`kept` weights over layers of these `shapes`, with one density for all."""
    sizes = [math.prod(shape) for shape in shapes]
    return _whole([kept * size / sum(sizes) for size in sizes], sizes, kept)


def erk(shapes: Sequence[Sequence[int]], kept: int) -> list[int]:
    """`kept` weights over layers of these `shapes` by Erdős–Rényi–Kernel [ERK].

    The density of a layer is ε · (sum of its dimensions) / (product of its dimensions), with the ε that gives `kept` in
    total; layers that this would fill beyond 1 are dense, and ε is that of the others.
    """
    sizes = [math.prod(shape) for shape in shapes]
    sums = [sum(shape) for shape in shapes]  # density · size = ε · sum
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        eps = (kept - sum(sizes[i] for i in full)) / max(sum(sums[i] for i in rest), 1)
        beyond = {i for i in rest if eps * sums[i] > sizes[i]}
        if not beyond:
            break
        full |= beyond
    return _whole([sizes[i] if i in full else eps * sums[i] for i in range(len(shapes))], sizes, kept)


def _whole(wanted: list[float], sizes: list[int], kept: int) -> list[int]:
    """Whole numbers near `wanted` that sum to `kept`; none is 0 where there is enough, for 0 would cut the network."""
    low = 1 if kept >= sum(size > 0 for size in sizes) else 0
    counts = [min(max(low, math.floor(want)), size) for want, size in zip(wanted, sizes, strict=True)]
    indices = range(len(sizes))
    while sum(counts) < kept:
        counts[max((i for i in indices if counts[i] < sizes[i]), key=lambda i: wanted[i] - counts[i])] += 1
    while sum(counts) > kept:
        counts[min((i for i in indices if counts[i] > low), key=lambda i: wanted[i] - counts[i])] -= 1
    return counts


DISTRIBUTIONS = {"erk": erk, "uniform": uniform}

# ---------------------------------------------------------------------- what training costs


def training_flops(
    forward: Mapping[str, float], densities: Mapping[str, float], steps: int, dense_gradients: int = 0
) -> float:
    """FLOPs of `steps` training steps by formula: what they would be if zeros cost nothing.

    With the dense forward FLOPs f_l of layer l and its density d_l, f_D = Σ f_l and f_S = Σ d_l f_l:

    .. code-block:: text

        a step                                      3 f_S          forward, gradient of inputs, gradient of weights
        a step with the gradient of all weights     2 f_S + f_D

    so dense training and Lasso (d = 1) cost 3 f_D a step, SET 3 f_S, GMP 3 f_S with the densities of each step (the sum
    is linear in d, so their mean will do), and RigL with one dense gradient per ΔT + 1 steps the published
    (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1).

    Args:
        forward: layer → FLOPs of the dense forward pass on one batch. Layers without a density count as dense.
        densities: layer → share of weights alive, the mean over the steps.
        steps: number of steps.
        dense_gradients: how many of them need the gradient of all weights.
    """
    unknown = densities.keys() - forward.keys()
    if unknown:
        raise ValueError(f"`forward` lacks the FLOPs of {', '.join(sorted(unknown))}.")
    dense = sum(forward.values())
    sparse = sum(flops * densities.get(name, 1.0) for name, flops in forward.items())
    return 3 * sparse * (steps - dense_gradients) + (2 * sparse + dense) * dense_gradients


# ---------------------------------------------------------------------- the rivals


class Rival:
    """Masks on the Linear and Conv weights of `model`, moved and applied by `step()`.

    Args:
        model: the network; a tied weight counts once.
        density: share of the weights that is left at the end, in (0, 1).
        total_steps: steps of the whole run.

    Attributes:
        masks: layer → bool mask of the weights that are alive.
        steps: number of steps so far.
        dense_gradients: how many of them needed the gradient of all weights.

    Raises:
        ValueError: an option out of range, or a model without such weights.
    """

    def __init__(self, model: nn.Module, density: float, total_steps: int) -> None:
        check_density(density)
        _check_count("total_steps", total_steps)
        self.weights = {layer.name: layer.weight for layer in weight_layers(model)}
        self.sizes = {name: weight.numel() for name, weight in self.weights.items()}
        if not sum(self.sizes.values()):
            raise ValueError("`model` has no Linear or Conv weights to make sparse.")
        self.kept = max(1, round(density * sum(self.sizes.values())))
        self.total_steps = total_steps
        self.steps = self.dense_gradients = 0
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.alive = dict(self.sizes)  # by the masks
        self._alive_steps = dict.fromkeys(self.weights, 0)  # sum of `alive` over the steps

    @torch.no_grad()
    def step(self) -> None:
        """Count a step, move the masks if it is time to, and apply them. Call it after every `optimizer.step()`."""
        for name, alive in self.alive.items():
            self._alive_steps[name] += alive
        self.steps += 1
        self._apply()  # first, so that what the optimizer made of masked weights is not seen
        if self._update() or self.steps == self.total_steps:
            self._apply(show=True)

    def _update(self) -> bool:
        """Move the masks; False where it is not the time."""
        raise NotImplementedError

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.masks[name].copy_(mask.view_as(self.masks[name]))
        self.alive = dict(zip(self.masks, count_nonzero(list(self.masks.values())), strict=True))

    def _apply(self, *, show: bool = False) -> None:
        """Zero what is masked; with `show` nothing that is alive is exactly zero."""
        for name, weight in self.weights.items():
            mask = self.masks[name]
            if self.alive[name] < self.sizes[name]:
                weight.masked_fill_(~mask, 0.0)
            if show:
                weight.masked_fill_(mask & (weight == 0), max(ALMOST_ZERO, torch.finfo(weight.dtype).tiny))

    def _prune(self, kept: int) -> None:
        """Mask all but the `kept` largest |w| of all layers together; what is masked stays masked."""
        # A masked weight loses against one that is alive and has become zero.
        scores = [torch.where(self.masks[name], w.abs().float(), -1.0).flatten() for name, w in self.weights.items()]
        largest = torch.split(_largest(torch.cat(scores), kept), list(self.sizes.values()))
        self._set(dict(zip(self.weights, largest, strict=True)))

    def flops(self, forward: Mapping[str, float]) -> float:
        """FLOPs of the steps so far by `training_flops`; `forward`: layer → dense forward FLOPs on one batch."""
        alive = {name: total / max(self.sizes[name] * self.steps, 1) for name, total in self._alive_steps.items()}
        return training_flops(forward, alive, self.steps, self.dense_gradients)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that the rest of the run depends on beside model and optimizer."""
        return {
            "steps": self.steps, "dense_gradients": self.dense_gradients, "alive_steps": dict(self._alive_steps),
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Raises ValueError where it is of other layers."""
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        saved = {name: tuple(mask.shape) for name, mask in state_dict["masks"].items()}
        if saved != shapes:
            raise ValueError(f"`state_dict` is of layers {saved}; this model has {shapes}.")
        self.steps, self.dense_gradients = state_dict["steps"], state_dict["dense_gradients"]
        self._alive_steps = dict(state_dict["alive_steps"])
        self._set(state_dict["masks"])


class GradualMagnitudePruning(Rival):
    """Dense at first, then the smallest |w| of all layers together go, step by step, and stay away [GMP].

    The sparsity after step t, with s_f = 1 − density, is s_f (1 − (1 − (t − t₀)/(t₁ − t₀))³) from t₀ = start ·
    total_steps to t₁ = end · total_steps; then the rest is trained on.

    Args:
        model, density, total_steps: as for `Rival`.
        start, end: shares of `total_steps`, 0 ≤ start < end ≤ 1.
        every: steps between prunings; the last one is at t₁. By default 100, less in a run of under 10,000 steps.
    """

    def __init__(
        self, model: nn.Module, density: float, total_steps: int, *,
        start: float = 0.0, end: float = 0.75, every: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, density, total_steps)
        _check_end(end)
        check_number("start", start, high=end)
        self.every = _every(every, total_steps, 100)
        self.last = max(1, round(end * total_steps))
        self.first = min(round(start * total_steps), self.last - 1)

    def kept_at(self, step: int) -> int:
        """How many weights the schedule leaves after `step` steps, of all."""
        done = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        size = sum(self.sizes.values())
        return self.kept + round((size - self.kept) * (1 - done) ** 3)

    def _update(self) -> bool:
        if not self.first < self.steps <= self.last or (self.steps % self.every and self.steps != self.last):
            return False
        self._prune(self.kept_at(self.steps))
        return True


class _DropAndGrow(Rival):
    """Sparse from the start; every layer keeps its number of weights while single ones go and others come.

    In each update a share of a layer's weights, those of smallest |w|, is dropped, and as many are grown by `_scores`
    among all that are not left then, as published: one that was dropped may win at once, and then keeps its value. The
    others start at zero, with the optimizer's averages for them at zero too.
    """

    def __init__(
        self, model: nn.Module, density: float, total_steps: int, optimizer: Optimizer, *,
        distribution: str, end: float, every: int | None, generator: Generator | None,
    ) -> None:  # fmt: skip
        super().__init__(model, density, total_steps)
        choose("distribution", distribution, DISTRIBUTIONS)
        _check_end(end)
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"Invalid `optimizer`: {optimizer!r}; expected one of torch.optim.")
        self.optimizer = optimizer
        self.every = _every(every, total_steps, 20)
        self.last = max(1, round(end * total_steps))
        self.generator = generator or Generator().manual_seed(0)
        counts = DISTRIBUTIONS[distribution]([tuple(w.shape) for w in self.weights.values()], self.kept)
        self._set({n: _largest(self._random(w), k) for (n, w), k in zip(self.weights.items(), counts, strict=True)})
        with torch.no_grad():
            self._apply(show=True)

    def _random(self, weight: Tensor) -> Tensor:
        """A random order of the entries, drawn on the CPU, so that every device gets the same."""
        device = self.generator.device
        return torch.randperm(weight.numel(), generator=self.generator, device=device).to(weight.device)

    def _share(self) -> float:
        """The share of each layer's weights that is dropped now."""
        raise NotImplementedError

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        """What decides who comes, flat: the largest, and never below 0."""
        raise NotImplementedError

    def _update(self) -> bool:
        if self.steps % self.every or self.steps >= self.last:
            return False
        for name, weight in self.weights.items():
            old, moved = self.masks[name].flatten(), int(self._share() * self.alive[name])
            if moved == 0:
                continue
            left = _largest(torch.where(old, weight.abs().float().flatten(), -1.0), self.alive[name] - moved)
            grown = _largest(torch.where(left, -1, self._scores(name, weight)), moved)
            new = (grown & ~old).view_as(weight)
            self.masks[name].copy_((left | grown).view_as(weight))
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(new, 0.0)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"])


class SET(_DropAndGrow):
    """Sparse evolutionary training [SET]: drop a share ζ of the smallest weights, grow as many at random.

    Two choices are those of the comparisons in [RigL] and not of the first paper: the smallest |w| go, not the smallest
    positive and the smallest negative ones apart, and nothing moves in the last quarter of the run.

    Args:
        model, density, total_steps: as for `Rival`. The weights keep the values they have, where they are not masked.
        optimizer: its averages start anew where a weight comes back.
        zeta: ζ in (0, 1).
        distribution: "erk" or "uniform".
        end: nothing moves from this share of `total_steps` on.
        every: steps between updates. By default 100, less in a run of under 2,000 steps.
        generator: of the masks; by default one of its own with seed 0.
    """

    def __init__(
        self, model: nn.Module, density: float, total_steps: int, optimizer: Optimizer, *, zeta: float = 0.3,
        distribution: str = "erk", end: float = 0.75, every: int | None = None, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        check_number("zeta", zeta, strict=True, high=1.0)
        self.zeta = zeta
        super().__init__(
            model, density, total_steps, optimizer,
            distribution=distribution, end=end, every=every, generator=generator,
        )  # fmt: skip

    def _share(self) -> float:
        return self.zeta

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        return self._random(weight)


class RigL(_DropAndGrow):
    """Drop the smallest weights, grow those with the largest gradients [RigL].

    At step t the share α/2 · (1 + cos(πt/T_end)) of each layer's weights is replaced. The gradients are those that the
    optimizer has just used, so `step()` comes before `zero_grad()`; the published algorithm makes no step of the
    optimizer where it moves weights, this one does.

    Args:
        model, density, total_steps, optimizer, distribution, every, generator: as for `SET`.
        alpha: α in (0, 1).
        end: T_end as a share of `total_steps`.
    """

    def __init__(
        self, model: nn.Module, density: float, total_steps: int, optimizer: Optimizer, *, alpha: float = 0.3,
        distribution: str = "erk", end: float = 0.75, every: int | None = None, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        check_number("alpha", alpha, strict=True, high=1.0)
        self.alpha = alpha
        super().__init__(
            model, density, total_steps, optimizer,
            distribution=distribution, end=end, every=every, generator=generator,
        )  # fmt: skip

    def _share(self) -> float:
        return self.alpha / 2 * (1 + math.cos(math.pi * self.steps / self.last))

    def _scores(self, name: str, weight: Tensor) -> Tensor:
        if weight.grad is None:
            raise ValueError(f"{name} has no gradient; RigL's step() comes after backward() and before zero_grad().")
        # A gradient that is not finite, as where a loss scale was too large, says nothing.
        return weight.grad.abs().float().flatten().nan_to_num(0.0, 0.0)

    def _update(self) -> bool:
        moved = super()._update()
        self.dense_gradients += moved
        return moved


class Lasso(Rival):
    """Training on loss + λ Σ|w|, and in the last step a cut to the largest |w| of all layers; nothing is retrained.

    .. code-block:: python

        (loss + rival.penalty()).backward()

    The penalty goes through the optimizer's rule like the loss does, with the subgradient sign(w), 0 at 0. So weights
    become small and never exactly zero before the cut; for zeros along the way there is `tb.ProxSGD`.

    Args:
        model, density, total_steps: as for `Rival`.
        lam: λ ≥ 0.
    """

    def __init__(self, model: nn.Module, density: float, total_steps: int, *, lam: float) -> None:
        super().__init__(model, density, total_steps)
        check_number("lam", lam)
        self.lam = lam

    def penalty(self) -> Tensor:
        """λ Σ|w| over the Linear and Conv weights, to be added to the loss."""
        return self.lam * torch.stack([weight.abs().sum() for weight in self.weights.values()]).sum()

    def _update(self) -> bool:
        if self.steps != self.total_steps:
            return False
        self._prune(self.kept)
        return True


def _largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest of the flat `scores`; of equal ones some, so that the count is exact."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(count, sorted=False).indices] = True
    return mask


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid `{name}`: {value!r}; expected a whole number of at least 1.")


def _check_end(end: Any) -> None:
    check_number("end", end, strict=True)
    if end > 1:
        raise ValueError(f"Invalid `end`: {end!r}; expected a share of the run in (0, 1].")


def _every(every: int | None, total_steps: int, updates: int) -> int:
    """Steps between updates: as given, else 100, or fewer so that a short run has `updates` of them."""
    if every is None:
        return min(100, max(1, total_steps // updates))
    _check_count("every", every)
    return every
