"""The dual part of the Bregman optimizers: v, and keeping θ and v together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import Shards, is_sharded
from ..regularizers import Regularizer
from ..warned import warn
from .held import local_state, store
from .onepass.plan import Plan
from .onepass.prox import intervals, same
from .onepass.rule import HOLD
from .options import COMMON, coupled_decay, decoupled_decay, dual_dtype
from .regularized import RegularizedOptimizer


class BregmanOptimizer(RegularizedOptimizer):
    """Mirror descent on v ∈ ∂J_δ(θ), with θ = prox_{δJ}(δv) written after every step.

    The weights θ are the sparse iterate at all times, and they have the last word: where they were changed from outside
    since the last step (a loaded checkpoint, an EMA swap, a clamp), v follows them, and what v remembers about weights
    that are zero stays.

    A method of your own is a subclass with `_descend`. It is made with `Method(params, lr=…, regularizer=…, lam=…)`, or
    has an `__init__` that passes its options as `defaults`. With a `_rule` it has the one-pass step as well.

    State per parameter: `dual` (v, float32 or better) and what the subclass adds; `lam` and `delta` are those that θ
    was last written with.

    Args:
        params: parameters or groups.
        defaults: options of a group with their defaults, `lr` among them.
        regularizer: J of the groups that bring none.
        options: without `defaults`: lr, lam, delta, weight_decay, maximize, foreach, fused, as for `LinBreg`.

    Raises:
        TypeError: an option that is not known.
        ValueError: an option out of range, or a regulariser that does not fit a parameter's shape.
    """

    has_dual = True

    def __init__(
        self,
        params: Any,
        defaults: Mapping[str, Any] | None = None,
        regularizer: Regularizer | None = None,
        **options: Any,
    ) -> None:
        own = COMMON if defaults is None else {**COMMON, **defaults}
        if unknown := options.keys() - own.keys():
            raise TypeError(f"Invalid option `{min(unknown)}`; expected one of {', '.join(own)}.")
        super().__init__(params, {**(own if defaults is None else defaults), **options}, regularizer)

    def _descend(
        self, duals: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """Move every v along its gradient, in place: the equation of the method."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the step

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        held = [(*self.local(p, reg), local_state(p, self.state)) for p in params]
        for part, on_part, state in held:
            self._follow(part, state, group, on_part)
        states = [state for _, _, state in held]
        duals, decoupled = [state["dual"] for state in states], decoupled_decay(group)
        if decoupled != 0:  # of v, because θ itself is written anew
            weights = [part.to(dual.dtype) for (part, _, _), dual in zip(held, duals, strict=True)]
            torch._foreach_sub_(duals, torch._foreach_mul(weights, decoupled))
        self._descend(duals, grads, states, group)
        for part, on_part, state in held:
            if not _waits(state, on_part):
                self._write(part, state, group, on_part)
        store(params, states, self.state)

    def _set_prox(self, plan: Plan, group: dict[str, Any], reg: Regularizer | None) -> bool:
        plan.set(DECAY=coupled_decay(group), SIGN=-1.0 if group["maximize"] else 1.0)
        plan.point("V", plan.buffer("dual"))
        lam, delta = [state["lam"] for state in plan.states], [state["delta"] for state in plan.states]
        asked = (group["lam"], group["delta"], lam, delta)
        if plan.asked is not None and same(asked, plan.asked):
            return True  # as in the last step: the numbers are in place
        now, before = intervals(reg, [group["lam"]], [group["delta"]]), intervals(reg, lam, delta)
        plan.asked = asked if now is not None and before is not None else None
        if now is None or before is None:
            return False
        (low0, high0, delta0), (low, high, delta) = before, now
        plan.set(LOW0=low0, HIGH0=high0, DELTA0=delta0, LOW=low, HIGH=high, DELTA=delta)
        return True

    def _pass(self, plan: Plan, rule: str, prox: bool, group: dict[str, Any], reg: Regularizer | None) -> None:
        if prox:
            plan.run(rule, "BOTH")
            _remember_all(plan.states, group)
            return
        edited = set()
        for p, state in zip(plan.params, plan.states, strict=True):
            own = plan.group_prox(p, reg, group, state)
            if own is None or own.edited(state["dual"], float(state["lam"]), float(state["delta"])):
                self._follow(p, state, group, reg)
                edited.add(p)
        if rule != HOLD.name:
            plan.run(rule, "DUAL")
        for p, state in zip(plan.params, plan.states, strict=True):
            own = plan.group_prox(p, reg, group, state)
            if own is None:
                if rule == HOLD.name or not _waits(state, reg):
                    self._write(p, state, group, reg)
            else:
                own.write(state["dual"], float(group["lam"]), float(group["delta"]), p in edited)
                _remember(state, group)

    def _start(self) -> None:
        """Create the missing state, v = θ/δ + p with p ∈ ∂J(θ), and warn once about tensors that start dense."""
        fresh: list[tuple[tuple[int, ...], Tensor]] = []
        for group, reg in zip(self.param_groups, self.regularizers, strict=True):
            for p in group["params"]:
                if p.grad is None or "dual" in self.state.get(p, {}):
                    continue
                if p.is_complex():
                    raise RuntimeError(f"{type(self).__name__} does not support complex parameters.")
                if self.state[p]:
                    raise ValueError("The loaded `state_dict` has no `dual`: it was not saved by a Bregman optimizer.")
                (part, on_part), state = self.local(p, reg), local_state(p, self.state)
                weight = part.detach().to(dual_dtype(p))
                dual = weight / group["delta"]
                if on_part is not None:
                    dual = dual + group["lam"] * on_part.subgradient(weight)
                    if p.numel() and not p.is_meta:
                        fresh.append((tuple(p.shape), _share_alive(p, on_part, weight)))
                state["dual"] = torch.empty_like(part, dtype=dual_dtype(p)).copy_(dual)
                _remember(state, group)
                if on_part is not None and on_part.costly and not p.is_meta:
                    state.update(written=checksum(part, on_part), waiting=0)
                store([p], [state], self.state)
        if fresh:
            _warn_if_dense(fresh)

    def _write(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None) -> None:
        """θ ← prox_{δJ}(δv), in place."""
        p.copy_(primal(state["dual"], reg, group["lam"], group["delta"]))
        _remember(state, group)
        if reg is not None and reg.costly:
            state["written"], state["waiting"] = checksum(p, reg), 0

    def _follow(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None) -> None:
        """Where θ is not what the last step wrote, give v the value that belongs to it."""
        if p.is_meta:
            return
        if "written" in state and reg is not None:
            now = checksum(p, reg)
            if bool(now == state["written"]):
                return
            state["written"] = now
        if state.get("waiting"):  # v has moved on from the θ that was written: there is nothing to compare with
            changed = torch.ones_like(p, dtype=torch.bool)
        else:
            expected = primal(state["dual"], reg, state["lam"], state["delta"]).to(p.dtype)
            if p.device.type == "cpu" and not _anywhere(not torch.equal(expected, p), reg):
                return  # elsewhere looking would wait for the device, so the same arithmetic runs masked
            changed = expected != p
            if reg is not None and reg.sums:  # a norm may have been added up in another order
                rounding = 64 * torch.finfo(state["dual"].dtype).eps * state["delta"] * state["dual"].abs()
                changed &= ~((expected - p).abs() <= rounding)
                if p.device.type == "cpu" and not _anywhere(bool(changed.any()), reg):
                    return
        self._set_dual(p.to(state["dual"].dtype), changed, state, group, reg)

    def _set_dual(
        self, weight: Tensor, changed: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        """v ← θ/δ + p where `changed`, with the p ∈ ∂J(θ) nearest to the p that v holds now."""
        dual, lam, delta = state["dual"], group["lam"], group["delta"]
        if reg is None:
            dual.copy_(torch.where(changed, weight / delta, dual))
            return
        held = dual - primal(dual, reg, state["lam"], state["delta"]) / state["delta"]
        eps, tiny = torch.finfo(dual.dtype).eps, torch.finfo(dual.dtype).tiny
        most = held.abs().amax() if held.numel() else held.sum()
        # Where λ is tiny or zero all memory is out of reach; it must not become infinite.
        near = held / torch.as_tensor(lam, dtype=dual.dtype, device=dual.device).clamp_min((eps * most).clamp_min(tiny))
        # A hair inside, so that rounding does not lift an entry that was set to zero over the threshold.
        p = (1 - 4 * eps * (weight == 0).to(dual.dtype)) * reg.nearest_subgradient(weight, near)
        dual.copy_(torch.where(reg.coupled(changed), weight / delta + lam * p, dual))

    # ------------------------------------------------------------------ for those who work on the weights between steps

    @torch.no_grad()
    def refresh(self, groups: Iterable[int] | None = None) -> None:
        """θ ← prox_{δJ}(δv) now, with λ and δ as they stand, instead of at the next step.

        `groups`: numbers of the parameter groups, by default all. Parameters without state, and what is frozen
        (`requires_grad=False`), are left alone.
        """
        for i in range(len(self.param_groups)) if groups is None else groups:
            group, reg = self.param_groups[i], self.regularizers[i]
            params = [p for p in group["params"] if p.requires_grad and "dual" in self.state.get(p, {})]
            plans = self.plans.of(i, params, self.state) if self.plans.ready(i, params) else None
            known = [self._set_prox(plan, group, reg) for plan in plans or ()]
            if plans and all(prox or plan.moves_dual_alone for plan, prox in zip(plans, known, strict=True)):
                for plan, prox in zip(plans, known, strict=True):
                    self._pass(plan, HOLD.name, prox, group, reg)
                continue
            for p in params:
                self._on(p, group, reg, self._follow, self._write)

    @torch.no_grad()
    def follow(self, p: Tensor) -> None:
        """Let v follow the θ of one parameter, where it was changed."""
        self._on(p, *self._group_of(p), self._follow)

    @torch.no_grad()
    def write(self, p: Tensor) -> None:
        """θ ← prox_{δJ}(δv) for one parameter, whose v was changed."""
        self._on(p, *self._group_of(p), self._write)

    def _on(self, p: Tensor, group: dict[str, Any], reg: Regularizer | None, *actions: Callable[..., None]) -> None:
        """Do something with what this rank holds of a parameter."""
        (part, on_part), state = self.local(p, reg), local_state(p, self.state)
        for action in actions:
            action(part, state, group, on_part)
        store([p], [state], self.state)

    def _group_of(self, p: Tensor) -> tuple[dict[str, Any], Regularizer | None]:
        for group, reg in zip(self.param_groups, self.regularizers, strict=True):
            if any(p is q for q in group["params"]):
                return group, reg
        raise ValueError(f"The optimizer holds no such parameter, of shape {tuple(p.shape)}.")


def primal(dual: Tensor, reg: Regularizer | None, lam: float | Tensor, delta: float | Tensor) -> Tensor:
    """θ = prox_{δJ}(δv)."""
    if reg is not None and not reg.homogeneous:
        return reg.prox(dual * delta, delta * lam)
    weight = dual if reg is None else reg.prox(dual, lam)
    return weight if isinstance(delta, float | int) and delta == 1 else weight * delta


def checksum(p: Tensor, reg: Regularizer) -> Tensor:
    """The sum of the bits of `p`, the same on every machine and for every order of summation and number of ranks."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[p.element_size()]
    found = p.detach().view(bits).sum(dtype=torch.int64)
    return found if reg.shards is None else reg.shards.sum(found)


def _anywhere(here: bool, reg: Regularizer | None) -> bool:
    """Whether it is so here, or on any rank that the prox waits for: all of them must go the same way."""
    return here if reg is None or reg.shards is None else bool(reg.shards.sum(torch.tensor(int(here))))


def _remember(state: dict[str, Any], group: dict[str, Any]) -> None:
    """The λ and δ that θ is written with."""
    for name in ("lam", "delta"):
        value = group[name]
        state[name] = value.clone() if isinstance(value, Tensor) else float(value)


def _remember_all(states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    lam, delta = group["lam"], group["delta"]
    if type(lam) is not float or any(state.get("lam") != lam or state.get("delta") != delta for state in states):
        for state in states:
            _remember(state, group)


def _waits(state: dict[str, Any], reg: Regularizer | None) -> bool:
    """Whether this step leaves θ, because its prox is taken at every `prox_every`-th step only."""
    if reg is None or reg.prox_every == 1:
        return False
    state["waiting"] = (state.get("waiting", 0) + 1) % reg.prox_every
    return state["waiting"] != 0


def _share_alive(p: Tensor, reg: Regularizer, weight: Tensor) -> Tensor:
    """The share of `p` that is alive, from the parts of all ranks; `reg` and `weight` are those of this one."""
    share = reg.alive(weight)
    return Shards.of(p).sum(share * weight.numel() / p.numel()) if is_sharded(p) else share


def _warn_if_dense(fresh: list[tuple[tuple[int, ...], Tensor]]) -> None:
    device = fresh[0][1].device
    shares = torch.stack([share.to(device) for _, share in fresh]).tolist()
    dense = [shape for (shape, _), share in zip(fresh, shares, strict=True) if share > 0.5]
    if dense:
        warn(
            f"{len(dense)} of {len(fresh)} regularised tensors start more than half dense (the first has shape "
            f"{dense[0]}). Bregman iterations add weights and hardly remove any: call tb.sparse_init_(model) first, or "
            "tb.prune_(model, density) where the network is trained already."
        )
