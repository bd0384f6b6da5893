"""Reach the density that was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .choices import choose
from .density import check_density
from .distributed import Spread, count_nonzero, is_sharded, local, sum_over_parts
from .layers import weight_layers
from .optim import RegularizedOptimizer
from .optim.base import primal
from .optim.options import check_number
from .optim.select import near_kth
from .regularizers import turning_point

WARM_UP = 200  # steps in which λ is looked for where none was given
SETTLE_EVERY = 10  # steps between exact corrections at the end of a run


@dataclass
class Scope:
    """One target: the groups whose λ is moved for it, and the weights that count."""

    target: float
    groups: list[int]
    weights: list[Tensor]
    gain: float
    side: int = 0  # of the last gap: 1 too dense, −1 too sparse
    start: float = 0.0
    searching: bool = False

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.weights)

    def density(self, optimizer: RegularizedOptimizer) -> float:
        return sum(count_nonzero(self.weights)) / self.size

    def check(self, optimizer: RegularizedOptimizer) -> None:
        """ValueError where λ cannot reach the target."""
        moved = {id(p) for i in self.groups for p in optimizer.param_groups[i]["params"] if p.requires_grad}
        for i in self.groups:
            if (reg := optimizer.regularizers[i]) is not None and not reg.countable:
                raise ValueError(
                    f"{type(reg).__name__} makes low rank and not zeros, so a density cannot be asked of it."
                )
        share = sum(count_nonzero([p for p in self.weights if id(p) not in moved])) / self.size
        if share >= self.target:
            raise ValueError(
                f"Invalid `density`: {self.target:g} cannot be reached; {share:.3%} of the weights are alive and not "
                "regularised (or have λ = 0, or do not require gradients)."
            )

    def follow(self, optimizer: RegularizedOptimizer, target: float, damping: float) -> None:
        """One step of the feedback rule."""
        ratio = self.density(optimizer) / target
        side = 1 if ratio > 1 else -1
        if side == -self.side:
            self.gain *= damping
        self.side = side
        if not optimizer.has_dual:  # no λ* that says where to stop, so the gap of [A]: absolute, at most one
            return self.scale(optimizer, (1 + self.gain * target * abs(ratio - 1)) ** side)
        factor = (1 + self.gain * abs(ratio - 1)) ** side
        exact = self.exact_factor(optimizer, target)
        return self.scale(optimizer, min(factor, exact) if side > 0 else max(factor, exact))

    def land(self, optimizer: RegularizedOptimizer, target: float) -> None:
        """Move λ to where the density is `target`, and let the weights follow at once."""
        if not optimizer.has_dual:
            return self.prune(optimizer, target)
        self.scale(optimizer, self.exact_factor(optimizer, target))
        return optimizer.refresh(self.groups)

    def scale(self, optimizer: RegularizedOptimizer, factor: float) -> None:
        for i in self.groups:
            group = optimizer.param_groups[i]
            # Where no λ was given yet all groups start from one and the same.
            group["lam"] = (group["lam"] if _any_positive(group["lam"]) else 1.0) * factor

    def exact_factor(self, optimizer: RegularizedOptimizer, target: float) -> float:
        """The factor on λ that leaves the target; groups keep the ratios of their λ."""
        counted, duals = {id(p) for p in self.weights}, {}
        for i in self.groups:
            params = [p for p in optimizer.param_groups[i]["params"] if id(p) in counted]
            duals[i] = {p: optimizer.state[p]["dual"] for p in params if "dual" in optimizer.state[p]}
        moved = {id(p) for some in duals.values() for p in some}
        if not moved:
            return 1.0
        fixed = sum(count_nonzero([p for p in self.weights if id(p) not in moved]))
        kept = round(target * self.size) - fixed
        near = near_kth(optimizer, {i: list(some.values()) for i, some in duals.items()}, kept)
        if near is not None:
            larger = int(near[0])
            factor = between(near[1:], kept - larger, larger)
            if factor is not None:
                return factor
        thresholds, params, held = [], [], []
        for i, some in duals.items():
            lam, delta = optimizer.param_groups[i]["lam"], optimizer.param_groups[i]["delta"]
            unit = lam if _any_positive(lam) else 1.0
            for p in some:
                _, reg = optimizer.local(p, optimizer.regularizers[i])
                assert reg is not None
                v = local(optimizer.state[p]["dual"])
                params.append(p)
                held.append((v, reg, unit, delta))
                if reg.closed_form:
                    thresholds.append((reg.thresholds(v) / unit).flatten())
        if len(thresholds) < len(params):
            return _factor_by_trial(held, params, kept)
        return _threshold(thresholds, params, kept)

    def prune(self, optimizer: RegularizedOptimizer, target: float) -> None:
        """Without a dual: zero the smallest weights, if there are too many."""
        values, params, parts = [], [], []
        for i in self.groups:
            for p in optimizer.param_groups[i]["params"]:
                if any(p is weight for weight in self.weights):
                    part, reg = optimizer.local(p, optimizer.regularizers[i])
                    assert reg is not None
                    params.append(p)
                    parts.append(part)
                    weight = part.detach().float()
                    values.append((reg.thresholds(weight) if reg.closed_form else weight.abs()).flatten())
        fixed = sum(count_nonzero(self.weights)) - sum(count_nonzero(params))
        smallest = _threshold(values, params, round(target * self.size) - fixed)
        with torch.no_grad():
            for part, value in zip(parts, values, strict=True):
                part.masked_fill_(value.view_as(part) <= smallest, 0.0)


class TargetDensity:
    r"""Moves λ so that the share of non-zero weights becomes `density`.

    .. code-block:: python

        control = tb.TargetDensity(optimizer, density=0.05, total_steps=len(loader) * epochs)
        ...
        optimizer.step()
        control.step()

    The density d counts the Linear and Conv weights, as `tb.density(model)` does. v is never changed: λ decides which
    of its entries are alive, and what is below the threshold keeps its memory.

    "exact": after every step λ is the threshold that leaves K = density·n weights, the (K+1)-th largest |v| for ℓ1.

    "feedback": every `every` steps, with the target d*,

    .. code-block:: text

        too dense    λ ← min(λ · (1 + a·|d/d* − 1|), λ*)
        too sparse   λ ← max(λ / (1 + a·|d/d* − 1|), λ*)        a ← damping · a at every change of sign

    [A], on the relative gap and never past the λ* that is exact now, so that one rule holds from 50 % to 0.1 % and for
    any step size. Over the last `settle` share of `total_steps` the density is corrected exactly, in small steps, and
    the last step lands on it.

    Where no λ was given (all zero) it is found: in the first steps λ is exact, whatever the scale of the gradients.

    Args:
        optimizer: LinBreg, AdaBreg, or ProxSGD ("feedback" only, and from a λ that you give; the last step prunes).
        density: d* in (0, 1), of all weights together; or one entry per parameter group, None where a group is left
            alone: then every group reaches its own.
        mode: "feedback" or "exact".
        total_steps: steps of the whole run, if known. From there on every step lands exactly.
        model: count the weights of this model. By default those of groups made by `tb.param_groups`, else all
            parameters with two dimensions or more.
        every: steps between changes of λ; by default 50, less in a run of under 5,000 steps, and 1 in exact mode.
        gain: a.
        damping: see above.
        ramp: over so many steps the target goes from the density at the start to d*, fast at first (cubic).
        settle: share of `total_steps` at the end.

    Raises:
        ValueError: an option out of range, no regularised group, or a density below the share of weights that are not
            regularised, which λ does not reach.

    [A] Aloradi, Roith, Habets, Tenbrinck, Adaptive Regularization for Sparsity Control in Bregman-Based Optimizers,
    arXiv 2605.07892.
    """

    _make = Scope  # experiments/lambda_moves.py compares other ways to move λ

    def __init__(
        self,
        optimizer: RegularizedOptimizer,
        density: float | Sequence[float | None] = 0.05,
        mode: str = "feedback",
        total_steps: int | None = None,
        *,
        model: nn.Module | None = None,
        every: int | None = None,
        gain: float = 1.0,
        damping: float = 0.95,
        ramp: int = 0,
        settle: float = 0.2,
    ) -> None:
        if not isinstance(optimizer, RegularizedOptimizer):
            kind = type(optimizer).__name__
            split = ", which leaves each rank a share of v: use fully_shard, or a fixed `lam`"
            hint = split if kind == "ZeroRedundancyOptimizer" else ""
            raise ValueError(f"Invalid `optimizer`: {kind}{hint}; expected LinBreg, AdaBreg or ProxSGD.")
        choose("mode", mode, ("feedback", "exact"))
        for name, count in (("total_steps", total_steps), ("every", every)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"Invalid `{name}`: {count!r}; expected a whole number of at least 1, or None.")
        check_number("gain", gain, strict=True)
        check_number("damping", damping, strict=True)
        check_number("ramp", ramp)
        check_number("settle", settle, high=1.0)
        self.optimizer, self.mode, self.total_steps = optimizer, mode, total_steps
        # Short runs need λ moved more often: at least a hundred times.
        self.every = every or (min(50, max(1, (total_steps or 5000) // 100)) if mode == "feedback" else 1)
        self.damping, self.ramp, self.settle = damping, ramp, settle
        self.steps, self._due = 0, False
        self.counted = False  # see `optim.protocols.Control`
        optimizer.controls.append(self)
        self._scopes = [self._make(*scope, gain=gain) for scope in self._split(density, model)]
        for scope in self._scopes:
            scope.start = scope.density(optimizer)
            scope.searching = not any(_any_positive(optimizer.param_groups[i]["lam"]) for i in scope.groups)
            scope.check(optimizer)
        if not optimizer.has_dual and (mode == "exact" or any(scope.searching for scope in self._scopes)):
            raise ValueError(
                f"{type(optimizer).__name__} has no dual: it needs mode='feedback' and a `lam` to start from."
            )

    def _split(
        self, density: float | Sequence[float | None], model: nn.Module | None
    ) -> Iterable[tuple[float, list[int], list[Tensor]]]:
        """(density, groups whose λ is moved, weights that count) of each target."""
        groups, regularizers = self.optimizer.param_groups, self.optimizer.regularizers
        if model is not None:
            counted = {id(layer.weight) for layer in weight_layers(model)}
        elif any("counted" in group for group in groups):
            counted = {id(p) for group in groups if group.get("counted", False) for p in group["params"]}
        else:
            counted = {id(p) for group in groups for p in group["params"] if p.dim() > 1}
        weights = [[p for p in group["params"] if id(p) in counted] for group in groups]
        moved = [i for i, reg in enumerate(regularizers) if reg is not None and weights[i]]
        positive = [i for i in moved if _any_positive(groups[i]["lam"])]
        if isinstance(density, Sequence) and not isinstance(density, str):
            if len(density) != len(groups):
                raise ValueError(
                    f"`density` has {len(density)} entries; expected one per parameter group, {len(groups)}."
                )
            for i, wanted in enumerate(density):
                if wanted is not None:
                    check_density(wanted, name=f"density[{i}]")
                    if i not in moved:
                        raise ValueError(f"Invalid `density[{i}]`: {wanted!r}; that group has no regularised weights.")
                    yield wanted, [i], weights[i]
            return
        check_density(density)
        if not moved:
            raise ValueError("`optimizer` regularises no weights, so there is no λ to move; see tb.param_groups.")
        # A group with λ = 0 beside others with λ > 0 was left unregularised on purpose.
        yield density, positive or moved, [p for some in weights for p in some]

    # ------------------------------------------------------------------ what a loop calls

    def step(self) -> None:
        """Count a step, and move λ if it is time to. Call it after every `optimizer.step()`."""
        self.steps += 1
        levels = self.optimizer.levels
        if levels is None:
            self._act(now=self._due)
            return
        if levels.restricted and (self.total_steps is None or self.steps < self.total_steps):
            # λ decides about all weights, and here only the live ones are at hand: it waits for the end of the phase.
            self._due = True
        else:
            if levels.restricted:
                levels.leave()
            self._act(now=self._due)
        self.counted = True
        levels.control_counted()

    def catch_up(self) -> None:
        """Move λ if it should have been moved while only a part of the weights was there (see `Multilevel`)."""
        if self._due:
            self._act(now=True)

    def _act(self, *, now: bool) -> None:
        self._due = False
        for scope in self._scopes:
            self._step(scope, now=now)

    def _step(self, scope: Scope, *, now: bool) -> None:
        target = scope.target
        if self.steps < self.ramp:
            target += (scope.start - target) * (1 - self.steps / self.ramp) ** 3
        total = self.total_steps
        if (total is not None and self.steps >= total) or (
            scope.searching and self.steps <= (WARM_UP if total is None else min(WARM_UP, total // 10))
        ):
            scope.land(self.optimizer, target)
        elif self.mode == "exact":
            if now or self.steps % self.every == 0:
                scope.land(self.optimizer, target)
        elif total is not None and self.steps > (1 - self.settle) * total and self.optimizer.has_dual:
            if now or self.steps % SETTLE_EVERY == 0:
                scope.land(self.optimizer, target)
        elif now or self.steps % self.every == 0:
            scope.follow(self.optimizer, target, self.damping)

    def land(self) -> None:
        """Make the density exact now, as the last step does where `total_steps` is known."""
        if self.optimizer.levels is not None:
            self.optimizer.levels.leave()
        for scope in self._scopes:
            scope.land(self.optimizer, scope.target)

    @property
    def density(self) -> float:
        """The share of non-zero weights now; of the first group that has a target where each has its own."""
        return self._scopes[0].density(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; λ itself is in the optimizer's state."""
        scopes = [[s.start, s.searching, s.gain, s.side] for s in self._scopes]
        return {"steps": self.steps, "due": self._due, "scopes": scopes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Raises ValueError where the targets are not as many."""
        if len(state_dict["scopes"]) != len(self._scopes):
            raise ValueError(
                f"`state_dict` has {len(state_dict['scopes'])} targets; this controller has {len(self._scopes)}."
            )
        self.steps, self._due = state_dict["steps"], state_dict.get("due", False)
        for scope, values in zip(self._scopes, state_dict["scopes"], strict=True):
            scope.start, scope.searching, scope.gain, scope.side = values


def between(values: Tensor, kept: int, beyond: int = 0) -> float | None:
    """A λ half-way between the `kept`-th and the next largest of `values`, below `beyond` others.

    Equal values are all in or all out, whichever is nearer, but never is nothing in. None where their neighbour, which
    bounds λ then, is not among the values.
    """
    # topk: kthvalue takes 100 times as long on CUDA.
    top = torch.topk(values, kept + 1, sorted=False).values
    below, above = (top.topk(2, largest=False).values if kept else top.expand(2)).tolist()
    if above == below and kept:
        larger, equal = torch.stack([(values > below).sum(), (values == below).sum()]).tolist()
        inside = kept - larger > equal / 2 or larger + beyond == 0
        rest = values[values < above] if inside else values[values > below]
        if not rest.numel():
            return None
        below, above = (float(rest.max()), above) if inside else (below, float(rest.min()))
    return half_way(below, above, values.dtype)


def half_way(below: float, above: float, dtype: torch.dtype) -> float:
    """Half-way as far as the floats allow it, for a group's norm is computed twice and may round differently."""
    middle = float(torch.tensor(below, dtype=dtype) + (above - below) / 2)
    return middle if below <= middle < above else below


def threshold_for(values: Tensor, kept: int) -> float:
    """A λ with `values` > λ for `kept` of them, or for as near a number as equal values allow."""
    kept = min(max(kept, 0), values.numel() - 1)
    # λ = 1 is what the values were measured in, so the answer is near 1 and few values need to be sorted.
    near = values[values > 0.9]
    lam = between(near, kept) if near.numel() > kept else None
    if lam is None:
        lam = between(values, kept)
    if lam is None:  # all are kept
        lam = float(values.min()) / 2
    return lam if lam > 0 else float(torch.finfo(values.dtype).tiny)


def threshold_over_ranks(values: Spread, kept: int) -> float:
    """What `threshold_for` finds, where every rank holds some of the values."""
    kept = min(max(kept, 0), values.size - 1)
    above, larger, equal = values.kth_largest(max(kept, 1))
    if kept == 0:
        lam = above
    elif larger + equal > kept and larger > 0 and kept - larger <= equal / 2:  # the equal ones are out
        lam = half_way(above, values.smallest_above(above), values.dtype)
    else:
        below = values.largest_below(above)
        lam = above / 2 if below == -math.inf else half_way(below, above, values.dtype)
    return lam if lam > 0 else float(torch.finfo(values.dtype).tiny)


def _factor_by_trial(duals: list[tuple[Any, ...]], tensors: list[Tensor], kept: int) -> float:
    """The factor on λ that leaves `kept` weights, or as near a number as can be, where no threshold is known.

    `duals`: v, J, λ and δ of each part of one of the `tensors`.
    """

    def alive(factor: float) -> int:
        counts = [torch.count_nonzero(primal(v, reg, factor * lam, delta)) for v, reg, lam, delta in duals]
        return int(sum_over_parts(torch.stack(counts), tensors).sum())

    low, high = turning_point(lambda factor: alive(factor) > kept)
    if high == 0:  # all are kept
        return float(torch.finfo(torch.float32).tiny)
    below, above = alive(high), alive(low)
    return low if below == 0 or above - kept < kept - below else high


def _threshold(parts: list[Tensor], tensors: list[Tensor], kept: int) -> float:
    """The λ for `kept` of the values in `parts`, which belong to the entries of the `tensors`."""
    if any(map(is_sharded, tensors)):
        return threshold_over_ranks(Spread(parts, tensors), kept)
    return threshold_for(torch.cat(parts), kept)


def _any_positive(lam: float | Tensor) -> bool:
    return bool((lam > 0).any()) if isinstance(lam, Tensor) else lam > 0
