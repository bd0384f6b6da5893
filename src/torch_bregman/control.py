"""Reach the density that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .choices import choose
from .distributed import count_nonzero, local
from .optim import RegularizedOptimizer
from .optim.options import check_number
from .optim.select import near_kth
from .optim.steps import StepCount
from .optim.unwrapped import unwrapped
from .targets import any_positive, targets
from .thresholds import between, factor_by_trial, threshold, threshold_for, threshold_over_ranks
from .warned import warn

__all__ = ["Scope", "TargetDensity", "threshold_for", "threshold_over_ranks"]

PLACE = "density_place"  # of a parameter group in the optimizer's state: where a controller stands in its schedule
WARM_UP = 200  # steps in which λ is looked for where none was given
SETTLE_EVERY = 10  # steps between exact corrections at the end of a run


@dataclass
class Scope:
    """One target: the groups whose λ is moved for it, and the weights that count."""

    target: float
    groups: list[int]
    weights: list[Tensor]
    also: list[int]  # groups without a weight that counts, whose λ is that of the first group
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
        if exact is None:
            return None
        return self.scale(optimizer, min(factor, exact) if side > 0 else max(factor, exact))

    def land(self, optimizer: RegularizedOptimizer, target: float) -> None:
        """Move λ to where the density is `target`, and let the weights follow at once."""
        if not optimizer.has_dual:
            return self.prune(optimizer, target)
        factor = self.exact_factor(optimizer, target)
        if factor is None:
            return None
        self.scale(optimizer, factor)
        return optimizer.refresh([*self.groups, *self.also])

    def scale(self, optimizer: RegularizedOptimizer, factor: float) -> None:
        groups = optimizer.param_groups
        for i in self.groups:
            # Where no λ was given yet all groups start from one and the same.
            groups[i]["lam"] = (groups[i]["lam"] if any_positive(groups[i]["lam"]) else 1.0) * factor
        for i in self.also:
            groups[i]["lam"] = _mean(groups[self.groups[0]]["lam"])

    def exact_factor(self, optimizer: RegularizedOptimizer, target: float) -> float | None:
        """The factor on λ that leaves the target; groups keep the ratios of their λ. None where nothing was learnt."""
        counted, duals = {id(p) for p in self.weights}, {}
        for i in self.groups:
            # What is frozen keeps its weights, whatever λ is.
            params = [p for p in optimizer.param_groups[i]["params"] if id(p) in counted and p.requires_grad]
            duals[i] = {p: optimizer.state[p]["dual"] for p in params if "dual" in optimizer.state.get(p, {})}
        moved = {id(p) for some in duals.values() for p in some}
        if not moved:
            return None
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
            unit = lam if any_positive(lam) else 1.0
            for p in some:
                _, reg = optimizer.local(p, optimizer.regularizers[i])
                assert reg is not None
                v = local(optimizer.state[p]["dual"])
                params.append(p)
                held.append((v, reg, unit, delta))
                if reg.closed_form:
                    thresholds.append((reg.thresholds(v) / unit).flatten())
        if len(thresholds) < len(params):
            return factor_by_trial(held, params, kept)
        return threshold(thresholds, params, kept)

    def prune(self, optimizer: RegularizedOptimizer, target: float) -> None:
        """Without a dual: zero the smallest weights, if there are too many."""
        values: list[Tensor] = []
        params: list[Tensor] = []
        parts: list[Tensor] = []
        for i in self.groups:
            for p in optimizer.param_groups[i]["params"]:
                if p.requires_grad and any(p is weight for weight in self.weights):
                    part, reg = optimizer.local(p, optimizer.regularizers[i])
                    assert reg is not None
                    params.append(p)
                    parts.append(part)
                    weight = part.detach().float()
                    values.append((reg.thresholds(weight) if reg.closed_form else weight.abs()).flatten())
        if not params:
            return
        fixed = sum(count_nonzero(self.weights)) - sum(count_nonzero(params))
        smallest = threshold(values, params, round(target * self.size) - fixed)
        with torch.no_grad():
            for part, value in zip(parts, values, strict=True):
                part.masked_fill_(value.view_as(part) <= smallest, 0.0)

    def missed(self, optimizer: RegularizedOptimizer) -> str:
        """Why fewer or more weights than asked for are alive after landing; empty where they are not, or by a group."""
        wanted, alive = self.target * self.size, sum(count_nonzero(self.weights))
        penalties = [optimizer.regularizers[i] for i in self.groups]
        single = all(reg is not None and reg.unit == "entry" for reg in penalties)
        if not optimizer.has_dual or not single or abs(alive - wanted) <= max(0.01 * wanted, 1):
            return ""
        states = [optimizer.state.get(p, {}) for p in self.weights]
        if alive > wanted:
            fixed = [p for p in self.weights if not p.requires_grad]
            still = sum(count_nonzero(fixed))
            return f"{still:,} weights are alive in layers that are frozen" if still > wanted else ""
        never = [p.numel() for p, state in zip(self.weights, states, strict=True) if "dual" not in state]
        duals = [state["dual"] for state in states if "dual" in state]
        unmoved = sum(never) + sum(dual.numel() for dual in duals) - sum(count_nonzero(duals))
        if self.size - unmoved >= wanted:
            return ""
        return (
            f"{unmoved:,} of {self.size:,} weights never had a gradient (inputs that are always zero, or units behind "
            "which nothing is alive)"
        )


class TargetDensity:
    r"""Moves λ so that the share of non-zero weights becomes `density`.

    .. code-block:: python

        control = tb.TargetDensity(optimizer, density=0.05, total_steps=len(loader) * epochs)
        ...
        optimizer.step()
        control.step()

    The density d counts the weights that `tb.density(model)` counts. v is never changed: λ decides which of its entries
    are alive, and what is below the threshold keeps its memory. Steps are those that the optimizer took: where it took
    none (a `GradScaler` skipped it, gradients are accumulated) nothing changes. What is frozen (`requires_grad=False`)
    stays as it is and counts. Groups that are added later are taken in. The place in the schedule is saved and loaded
    with the optimizer's state, so that a controller that is made anew goes on.

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
        optimizer: LinBreg, AdaBreg, or ProxSGD ("feedback" only, and from a λ that you give; the last step prunes),
            also as accelerate, Transformers and Lightning wrap it. An earlier controller of the same groups ends.
        density: d* in (0, 1), of all weights together; or one entry per parameter group, None where a group is left
            alone: then every group reaches its own.
        mode: "feedback" or "exact".
        total_steps: steps of the whole run, if known. From there on every step lands exactly.
        model: count the weights of this model. By default those of groups made by `tb.param_groups`, else those that
            `tb.sparse_init_` or `tb.prune_` knew as weights, else all parameters with two dimensions or more.
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
        optimizer = unwrapped(optimizer)
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
        self._count, self._due, self._said = StepCount(optimizer), False, False
        self.counted = False  # see `optim.protocols.Control`
        self._density, self._model, self._gain = density, model, gain
        if optimizer.levels is not None and optimizer.levels.restricted:
            optimizer.levels.leave()
        self._scopes = self._make_scopes()
        for scope in self._scopes:
            scope.check(optimizer)
        if not optimizer.has_dual and (mode == "exact" or any(scope.searching for scope in self._scopes)):
            raise ValueError(
                f"{type(optimizer).__name__} has no dual: it needs mode='feedback' and a `lam` to start from."
            )
        for other in [other for other in optimizer.controls if set(other.moves) & set(self.moves)]:
            optimizer.controls.remove(other)
        optimizer.controls.append(self)
        self.take_place()

    def _make_scopes(self) -> list[Scope]:
        scopes = [self._make(*scope, gain=self._gain) for scope in targets(self.optimizer, self._density, self._model)]
        for scope in scopes:
            scope.start = scope.density(self.optimizer)
            scope.searching = not any(any_positive(self.optimizer.param_groups[i]["lam"]) for i in scope.groups)
        self._held = [len(group["params"]) for group in self.optimizer.param_groups]
        return scopes

    def _take_in(self) -> None:
        """Groups were added: those with a λ of zero take that of the others, and all is counted anew."""
        groups, regularizers = self.optimizer.param_groups, self.optimizer.regularizers
        for i in range(len(self._held), len(groups)):
            if regularizers[i] is not None and not any_positive(groups[i]["lam"]):
                groups[i]["lam"] = _mean(groups[self._scopes[0].groups[0]]["lam"])
        if isinstance(self._density, Sequence):
            self._density = [*self._density, *[None] * (len(groups) - len(self._held))]
        before = self._scopes
        self._scopes = self._make_scopes()
        for scope, was in zip(self._scopes, before, strict=True):
            scope.start, scope.searching, scope.gain, scope.side = was.start, was.searching, was.gain, was.side

    # ------------------------------------------------------------------ what a loop calls

    def step(self) -> None:
        """Count the steps that the optimizer took, and move λ if it is time to. Call it after `optimizer.step()`.

        Raises RuntimeError where a controller that was made later moves the λ of this one's groups.
        """
        if self not in self.optimizer.controls:
            raise RuntimeError(
                "Another TargetDensity was made for this optimizer, so this one moves λ no more: use that."
            )
        levels = self.optimizer.levels
        if [len(group["params"]) for group in self.optimizer.param_groups] != self._held:
            if levels is not None and levels.restricted:
                levels.leave()
            self._take_in()
        taken = self._count.count()
        if levels is None:
            self._act(now=self._due, learnt=taken > 0)
            return
        if levels.restricted and not self.ended:
            # λ decides about all weights, and here only the live ones are at hand: it waits for the end of the phase.
            self._due |= taken > 0
        else:
            if levels.restricted:
                levels.leave()
            self._act(now=self._due, learnt=taken > 0)
        self.counted = True
        levels.control_counted()

    @property
    def steps(self) -> int:
        """Steps so far: those that the optimizer took, and a few that a scaler skipped."""
        return self._count.now

    @property
    def ended(self) -> bool:
        """Whether `total_steps` are through."""
        return self.total_steps is not None and self.steps >= self.total_steps

    def catch_up(self) -> None:
        """Move λ if it should have been moved while only a part of the weights was there (see `Multilevel`)."""
        if self._due:
            self._act(now=True, learnt=True)

    def _act(self, *, now: bool, learnt: bool) -> None:
        if not learnt and not self.ended:
            return
        self._due = False
        for scope in self._scopes:
            self._step(scope, now=now)
        if self.ended and not self._said:
            self._said = True
            for scope in self._scopes:
                if why := scope.missed(self.optimizer):
                    warn(f"`density` is {scope.target:g}, and {scope.density(self.optimizer):.3%} are alive: {why}.")

    def _step(self, scope: Scope, *, now: bool) -> None:
        target = scope.target
        if self.steps < self.ramp:
            target += (scope.start - target) * (1 - self.steps / self.ramp) ** 3
        total = self.total_steps
        if self.ended or (scope.searching and self.steps <= (WARM_UP if total is None else min(WARM_UP, total // 10))):
            scope.land(self.optimizer, target)
        elif self.mode == "exact":
            if now or self._count.completes(self.every):
                scope.land(self.optimizer, target)
        elif total is not None and self.steps > (1 - self.settle) * total and self.optimizer.has_dual:
            if now or self._count.completes(SETTLE_EVERY):
                scope.land(self.optimizer, target)
        elif now or self._count.completes(self.every):
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

    @property
    def lam(self) -> float:
        """λ now, of the first group that is moved; the mean where it is a tensor."""
        return float(_mean(self.optimizer.param_groups[self._scopes[0].groups[0]]["lam"]))

    @property
    def moves(self) -> list[int]:
        """The numbers of the parameter groups whose λ it moves."""
        return [i for scope in self._scopes for i in (*scope.groups, *scope.also)]

    def to_dict(self) -> dict[str, float]:
        """Numbers for a logger: density, target, lam, steps."""
        return {"density": self.density, "target": self._scopes[0].target, "lam": self.lam, "steps": self.steps}

    def __repr__(self) -> str:
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        targets = ", ".join(f"{100 * scope.target:.4g} %" for scope in self._scopes)
        every = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"] if p.dim() > 1)
        size = sum(scope.size for scope in self._scopes)
        alive = f"{100 * self.density:.4g} % alive, λ = {self.lam:.3g}, step {self.steps:,}{of}"
        return f"TargetDensity({targets} asked, {alive}; {size:,} of {every:,} matrix entries are counted)"

    def state_dict(self) -> dict[str, Any]:
        """Plain values; λ itself is in the optimizer's state."""
        scopes = [[s.start, s.searching, s.gain, s.side] for s in self._scopes]
        count = self._count
        return {"steps": count.taken, "skipped": count.skipped, "uncounted": count.uncounted, "due": self._due,
                "scopes": scopes}  # fmt: skip

    def leave_place(self, groups: list[dict[str, Any]]) -> None:
        """Write the place in the schedule into the groups of the optimizer's `state_dict()`."""
        for scope in self._scopes:
            place = [self._count.taken, self._count.skipped, self._count.uncounted, self._due]
            values = [scope.target, *place, scope.start, scope.searching, scope.gain, scope.side]
            for i in scope.groups:
                groups[i][PLACE] = values

    def take_place(self) -> None:
        """Go on where a loaded state of the optimizer was saved, if this has not begun and asks for the same."""
        found = [self.optimizer.param_groups[scope.groups[0]].get(PLACE) for scope in self._scopes]
        for group in self.optimizer.param_groups:
            group.pop(PLACE, None)
        places = [place for place in found if place is not None]
        if self.steps or len(places) < len(found):
            return
        steps, skipped, uncounted, due = places[0][1:5]
        others = [place[0] for place in places] != [scope.target for scope in self._scopes]
        if not others and (self.total_steps is None or steps < self.total_steps):  # else it was another schedule
            scopes = [place[5:] for place in places]
            self.load_state_dict(
                {"steps": steps, "skipped": skipped, "uncounted": uncounted, "due": due, "scopes": scopes}
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Raises ValueError where the targets are not as many."""
        if len(state_dict["scopes"]) != len(self._scopes):
            raise ValueError(
                f"`state_dict` has {len(state_dict['scopes'])} targets; this controller has {len(self._scopes)}."
            )
        self._count.load(state_dict["steps"], state_dict.get("skipped", 0), state_dict.get("uncounted", 0))
        self._due = state_dict.get("due", False)
        for scope, values in zip(self._scopes, state_dict["scopes"], strict=True):
            scope.start, scope.searching, scope.gain, scope.side = values


def _mean(lam: float | Tensor) -> float:
    return float(lam.mean()) if isinstance(lam, Tensor) else lam
