"""What the Bregman optimizers share: checks, the dual state, and keeping θ and v together."""

from __future__ import annotations

import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .. import kernels
from ..distributed import PLAIN, Shards, is_sharded, local, sum_over_parts
from ..regularizers import Grouped, NuclearNorm, Regularizer, broadcasts
from . import fused, gpu
from .fused import dual_dtype

_NO_PENALTY = "none"


def check_number(name: str, value: Any, low: float = 0.0, *, strict: bool = False, high: float = math.inf) -> None:
    """ValueError unless `value` is a finite number (or a tensor of such) in [low, high), or (low, high) if strict."""
    numbers = value.detach() if isinstance(value, Tensor) else torch.as_tensor(_number(name, value), dtype=torch.double)
    inside = numbers.isfinite() & ((numbers > low) if strict else (numbers >= low)) & (numbers < high)
    if not bool(inside.all()):
        bounds = f"{'>' if strict else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"Invalid `{name}`: {value!r}; expected a finite number {bounds}.")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"Invalid `{name}`: {value!r}; expected a number.") from None


class BregmanOptimizer(Optimizer):
    """Base of LinBreg and AdaBreg: mirror descent on v ∈ ∂J_δ(θ), with θ = prox_{δJ}(δv) written after every step.

    The weights θ are the sparse iterate at all times, and they have the last word: where they were changed from outside
    since the last step (a loaded checkpoint, an EMA swap, a clamp), v follows them, and what v remembers about weights
    that are zero stays.

    State per parameter: `dual` (v, float32 or better) and what the subclass adds; `lam` and `delta` are those that θ
    was last written with. Regularisers are objects and live beside `param_groups`, which holds plain values only. The
    state of a DTensor (`fully_shard`, tensor parallelism) is cut as it is; the steps are those of a single process.
    """

    #: Do weights come from v (LinBreg, AdaBreg), or is θ all there is (ProxSGD)?
    has_dual = True

    regularizers: list[Regularizer | None]

    def __init__(self, params: Any, defaults: dict[str, Any], regularizer: Regularizer | None) -> None:
        check_regularizer(regularizer)
        self._default_regularizer = regularizer
        self.regularizers = []
        self.levels: Any = None  # a tb.Multilevel, which exchanges weights by their live parts and back
        self.controls: list[Any] = []  # what moves λ: tb.TargetDensity
        self._forget()
        super().__init__(params, {"regularizer": _name(regularizer), **defaults, "entries_updated": 0})

    # ------------------------------------------------------------------ groups and their options

    def _check_group(self, group: dict[str, Any]) -> None:
        """ValueError if an option of the group is out of range; subclasses add theirs."""
        check_number("lr", group["lr"])
        check_number("lam", group["lam"])
        check_number("delta", group["delta"], strict=True)
        check_number("weight_decay", group["weight_decay"])
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"Invalid `lr`: a tensor of shape {tuple(group['lr'].shape)}; expected one element.")
        if group["fused"] and group["foreach"]:
            raise ValueError("Invalid `fused`: True; `fused` and `foreach` cannot be True together.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; it may carry its own `regularizer` object, `lam`, `delta` and other options."""
        param_group = dict(param_group)
        given = param_group.get("regularizer", self._default_regularizer)
        if isinstance(given, str):  # a group of another optimizer, already reduced to plain values
            raise ValueError(f"Invalid `regularizer`: {given!r}; expected an object such as tb.L1(), or None.")
        check_regularizer(given)
        param_group["regularizer"] = _name(given)
        for name, default in self.defaults.items():
            param_group.setdefault(name, default)
        self._check_group(param_group)
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if param_group["fused"] and p.device.type == "cpu":
                    kernels.require("`fused=True` on the CPU")
                if param_group["fused"] and p.device.type == "cuda" and not gpu.available():
                    raise ImportError("`fused=True` on a GPU needs Triton: pip install triton.")
                if getattr(p, "_is_flat_param", False) and isinstance(given, Grouped | NuclearNorm):
                    raise ValueError(
                        f"Invalid `params`: FullyShardedDataParallel flattens weights, but {given!r} needs their "
                        "shape; use torch.distributed.fsdp.fully_shard."
                    )
                if given is not None:
                    given.check(p.shape)
                if param_group["fused"] and is_sharded(p):
                    raise ValueError("Invalid `fused`: True; DTensors take the plain step, so leave it None.")
                for name in ("lam", "delta"):
                    value = param_group[name]
                    if isinstance(value, Tensor) and value.numel() != 1 and is_sharded(p):
                        raise ValueError(
                            f"Invalid `{name}`: a tensor of shape {tuple(value.shape)}; expected one number for a "
                            "DTensor. Groups of parameters may have different ones."
                        )
                    if isinstance(value, Tensor) and not broadcasts(value.shape, p.shape):
                        raise ValueError(
                            f"Invalid `{name}`: a tensor of shape {tuple(value.shape)}; expected one that broadcasts "
                            f"against a parameter of shape {tuple(p.shape)}."
                        )
        except (ValueError, ImportError):
            del self.param_groups[-1]
            raise
        self.regularizers.append(given)

    def __getstate__(self) -> dict[str, Any]:
        if self.levels is not None:
            self.levels.leave()
        return {
            **super().__getstate__(),
            "regularizers": self.regularizers,
            "_default_regularizer": self._default_regularizer,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("levels", None), ("controls", [])):
            self.__dict__.setdefault(name, value)  # a copy has none
        self._forget()
        self.defaults.pop("differentiable", None)  # torch puts it there; no option of ours
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _forget(self) -> None:
        """Parameters or their state may have been exchanged."""
        self._plans: dict[int, Any] = {}  # what the fused step knows about each group
        self._gpu_plans: dict[int, Any] = {}
        self._on_shards: dict[Tensor, Regularizer | None] = {}  # J on this rank's part of each DTensor
        self._known: list[int] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`. The state keeps the precision it was saved with.

        Raises ValueError where the groups were saved with another regulariser.
        """
        ours = [_name(regularizer) for regularizer in self.regularizers]
        for i, (mine, group) in enumerate(zip(ours, state_dict["param_groups"], strict=False)):
            other = group.get("regularizer", mine)
            if other != mine:
                raise ValueError(f"`state_dict` was saved with regularizer {other} in group {i}; here it is {mine}.")
        final: dict[str, Any] = {}  # what the user's own hooks make of it

        def restore(_: Any) -> None:
            # torch casts state to the parameter's dtype; a bfloat16 v would lose the support.
            parameters = [p for group in self.param_groups for p in group["params"]]
            keys = [key for group in final["param_groups"] for key in group["params"]]
            for key, p in zip(keys, parameters, strict=True):
                for name, value in final["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        where = value.device if name == "step" else p.device
                        if is_sharded(p) and not is_sharded(value) and name not in PLAIN:  # saved by one process
                            value = Shards.of(p).wrap(Shards.of(p).part(value))
                        self.state[p][name] = value.to(device=where, copy=True)

        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    # ------------------------------------------------------------------ the step

    @_disable_dynamo  # it would fall into a graph for each line; what is worth compiling compiles itself
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the loss and returns it. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if self._who(active) != self._known:
            self._start()
            self._plans, self._gpu_plans = {}, {}
            self._known = self._who(active)
        for i, (group, regularizer) in enumerate(zip(self.param_groups, self.regularizers, strict=True)):
            params = active[i]
            if self._wants_fused(group, params) and self._fused(i, params, group, regularizer):
                continue
            grads = [self._gradient(p, group) for p in params]
            foreach = group["foreach"]
            if foreach is None:
                foreach = bool(params) and all(p.is_cuda for p in params)
            # One mathematics for both: a list of all tensors, or lists of one.
            for at in [slice(None)] if foreach else [slice(i, i + 1) for i in range(len(params))]:
                if params[at]:
                    self._update(params[at], grads[at], group, regularizer)
        return loss

    def _who(self, active: list[list[Tensor]]) -> list[int]:
        """Tells whether parameters or their state have been exchanged since the last step."""
        return [id(x) for x in (*itertools.chain(*active), *self.state.values())]

    def _wants_fused(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """What was asked for, or else one pass: on the CPU once the work done would have paid for compiling it.

        The count is part of `param_groups`, so that a resumed run switches at the same step.
        """
        if group["fused"] is not None or group["foreach"] is not None:
            return bool(group["fused"])
        if not params or torch.compiler.is_compiling():
            return False
        if params[0].device.type == "cuda":
            return gpu.available()
        if params[0].device.type != "cpu" or not kernels.available():
            return False
        if group["entries_updated"] >= fused.EARNED or (self.levels is not None and self.levels.sparse):
            return True
        group["entries_updated"] += sum(p.numel() for p in params)
        return False

    def _fused(self, i: int, params: list[Tensor], group: dict[str, Any], reg: Regularizer | None) -> bool:
        """One pass over memory for `params` of group i. False, and nothing done, where there is none for them."""
        on_gpu = gpu.plan(self, i, params) if params and gpu.supports(params[0]) else None
        if on_gpu is not None:
            if not self._elementwise(on_gpu, group, reg):
                return False
            grads = on_gpu.gradients(self._check_gradient)
            on_gpu.run(self._arm(on_gpu, group), not self.has_dual, grads)
            self._remember_all(on_gpu.states, group)
            return True
        plans = fused.plans(self, i, params)
        if plans is None:
            return False
        for p in params:
            if not p.numel():
                self._count(self.state[p])
        gradients = [plan.gradients(self._check_gradient) for plan in plans]  # held until the pass is through
        for plan, grads in zip(plans, gradients, strict=True):
            plan.point("GRAD", grads)
            self._pass(plan, self._arm(plan, group), group, reg)
        return True

    def _elementwise(self, plan: fused.Plan | gpu.Plan, group: dict[str, Any], reg: Regularizer | None) -> bool:
        """Give the plan v and the prox as numbers. False where the prox needs more than one entry at a time."""
        plan.set(DECAY=coupled_decay(group), SIGN=-1.0 if group["maximize"] else 1.0)
        plan.point("V", plan.buffer("dual"))
        lam, delta = [state["lam"] for state in plan.states], [state["delta"] for state in plan.states]
        asked = (group["lam"], group["delta"], lam, delta)
        if plan.asked is not None and fused.same(asked, plan.asked):
            return True  # as in the last step: the numbers are in place
        now, before = fused.intervals(reg, [group["lam"]], [group["delta"]]), fused.intervals(reg, lam, delta)
        plan.asked = asked if now is not None and before is not None else None
        if now is None or before is None:
            return False
        (low0, high0, delta0), (low, high, delta) = before, now
        plan.set(LOW0=low0, HIGH0=high0, DELTA0=delta0, LOW=low, HIGH=high, DELTA=delta)
        return True

    def _remember_all(self, states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        lam, delta = group["lam"], group["delta"]
        if type(lam) is not float or any(state.get("lam") != lam or state.get("delta") != delta for state in states):
            for state in states:
                self._remember(state, group)

    def _arm(self, plan: fused.Plan | gpu.Plan, group: dict[str, Any]) -> str:
        """Give the plan the numbers and buffers of this step; the name of the rule that moves v."""
        raise NotImplementedError

    def _count(self, state: dict[str, Any]) -> None:
        """A step of a parameter without entries, which no pass sees: a weight of which nothing lives."""

    def _pass(self, plan: fused.Plan, rule: str, group: dict[str, Any], reg: Regularizer | None) -> None:
        """Move v by `rule` and write θ; with "HOLD" only θ is written."""
        if self._elementwise(plan, group, reg):
            plan.run(rule, "BOTH")
            self._remember_all(plan.states, group)
            return
        edited = set()
        for p, state in zip(plan.params, plan.states, strict=True):
            own = plan.grouped(p, reg, group, state)
            if own is None or own.edited(state["dual"], float(state["lam"]), float(state["delta"])):
                self._follow(p, state, group, reg)
                edited.add(p)
        if rule != "HOLD":
            plan.run(rule, "DUAL")
        for p, state in zip(plan.params, plan.states, strict=True):
            own = plan.grouped(p, reg, group, state)
            if own is None:
                if rule == "HOLD" or not self._waits(state, reg):
                    self._write(p, state, group, reg)
            else:
                own.write(state["dual"], float(group["lam"]), float(group["delta"]), p in edited)
                self._remember(state, group)

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        own = [self._own(p, reg) for p in params]
        states = [state for _, state, _ in own]
        for part, state, on_part in own:
            self._follow(part, state, group, on_part)
        duals, decoupled = [state["dual"] for state in states], decoupled_decay(group)
        if decoupled != 0:  # of v, because θ itself is written anew
            weights = [part.to(dual.dtype) for (part, _, _), dual in zip(own, duals, strict=True)]
            torch._foreach_sub_(duals, torch._foreach_mul(weights, decoupled))
        self._descend(duals, grads, states, group)
        for part, state, on_part in own:
            if not self._waits(state, on_part):
                self._write(part, state, group, on_part)
        self._keep(params, states)

    def _own(self, p: Tensor, reg: Regularizer | None) -> tuple[Tensor, dict[str, Any], Regularizer | None]:
        """What this rank holds of `p`: its part, with its state and J on it. `_keep` afterwards what became of them."""
        state = self.state[p]
        if is_sharded(p):
            state = {k: local(x) if isinstance(x, Tensor) else x for k, x in state.items()}
        part, on_part = self._part(p, reg)
        return part, state, on_part

    def _part(self, p: Tensor, reg: Regularizer | None) -> tuple[Tensor, Regularizer | None]:
        """The part of `p` that this rank holds, and J on it."""
        if not is_sharded(p):
            return p, reg
        if p not in self._on_shards:
            self._on_shards[p] = None if reg is None else reg.on_shards(Shards.of(p))
        return local(p), self._on_shards[p]

    def _keep(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        """Take over the states of parts, where what is shaped like the weight is kept as a DTensor like it."""
        for p, state in zip(params, states, strict=True):
            if is_sharded(p):
                held = self.state[p]
                for name, x in state.items():
                    if name in PLAIN:
                        held[name] = x
                    elif name not in held or local(held[name]) is not x:
                        held[name] = Shards.of(p).wrap(x)

    def _descend(
        self, duals: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """Move every v along its gradient, in place: the equation of the method."""
        raise NotImplementedError

    def _check_gradient(self, p: Tensor) -> Tensor:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients; use a layer with sparse=False."
            )
        if grad.is_complex():
            raise RuntimeError(
                f"{type(self).__name__} does not support complex gradients; pass real and imaginary parts."
            )
        return grad

    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        grad = self._check_gradient(p)
        if is_sharded(p):  # tensor parallelism may leave sums to be taken
            grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        grad = local(grad).to(dual_dtype(p))
        if group["maximize"]:
            grad = -grad
        coupled = coupled_decay(group)
        if coupled != 0:
            grad = grad.add(local(p), alpha=coupled)  # after the prox it would be overwritten
        return grad

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
                part, state, on_part = self._own(p, reg)
                weight = part.detach().to(dual_dtype(p))
                dual = weight / group["delta"]
                if on_part is not None:
                    dual = dual + group["lam"] * on_part.subgradient(weight)
                    if p.numel() and not p.is_meta:
                        fresh.append((tuple(p.shape), _share_alive(p, on_part, weight)))
                state["dual"] = torch.empty_like(part, dtype=dual_dtype(p)).copy_(dual)
                self._remember(state, group)
                if on_part is not None and on_part.costly and not p.is_meta:
                    state.update(written=checksum(part, on_part), waiting=0)
                self._keep([p], [state])
        if fresh:
            _warn_if_dense(fresh)

    @staticmethod
    def _remember(state: dict[str, Any], group: dict[str, Any]) -> None:
        for name in ("lam", "delta"):
            value = group[name]
            state[name] = value.clone() if isinstance(value, Tensor) else float(value)

    def _write(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None) -> None:
        """θ ← prox_{δJ}(δv), in place."""
        p.copy_(primal(state["dual"], reg, group["lam"], group["delta"]))
        self._remember(state, group)
        if reg is not None and reg.costly:
            state["written"], state["waiting"] = checksum(p, reg), 0

    def _waits(self, state: dict[str, Any], reg: Regularizer | None) -> bool:
        """Whether this step leaves θ, because its prox is taken at every `prox_every`-th step only."""
        if reg is None or reg.prox_every == 1:
            return False
        state["waiting"] = (state.get("waiting", 0) + 1) % reg.prox_every
        return state["waiting"] != 0

    def _follow(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None) -> None:
        """Where θ is not what the last step wrote, give v the value that belongs to it."""
        if p.is_meta:
            return
        if "written" in state:
            assert reg is not None
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
            if isinstance(reg, Grouped):  # a norm may have been added up in another order
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

    # ------------------------------------------------------------------ for those who change λ between steps

    @torch.no_grad()
    def refresh(self, groups: Iterable[int] | None = None) -> None:
        """θ ← prox_{δJ}(δv) now, with λ and δ as they stand, instead of at the next step.

        `groups`: numbers of the parameter groups, by default all. Parameters without state are left alone.
        """
        for i in range(len(self.param_groups)) if groups is None else groups:
            group, reg = self.param_groups[i], self.regularizers[i]
            params = [p for p in group["params"] if "dual" in self.state.get(p, {})]
            known = self._plans.get(i)
            plans = fused.plans(self, i, params) if known and known[1] and len(known[0]) == len(params) else None
            on_gpu = gpu.plan(self, i, params) if i in self._gpu_plans else None
            if on_gpu is not None and self._elementwise(on_gpu, group, reg):
                on_gpu.run("HOLD", primal=False)
                self._remember_all(on_gpu.states, group)
                continue
            if plans is not None:
                for plan in plans:
                    self._pass(plan, "HOLD", group, reg)
                continue
            for p in params:
                part, state, on_part = self._own(p, reg)
                self._follow(part, state, group, on_part)
                self._write(part, state, group, on_part)
                self._keep([p], [state])


def as_float(lr: float | Tensor) -> float:
    return lr.item() if isinstance(lr, Tensor) else lr


def coupled_decay(group: dict[str, Any]) -> float:
    """ω: what a weight adds to its gradient, as a share of the weight."""
    return 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]


def decoupled_decay(group: dict[str, Any]) -> float:
    """τω: what a weight takes off its v, as a share of the weight."""
    return as_float(group["lr"]) * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0


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


def _share_alive(p: Tensor, reg: Regularizer, weight: Tensor) -> Tensor:
    """The share of `p` that is alive, from the parts of all ranks; `reg` and `weight` are those of this one."""
    share = reg.alive(weight)
    return Shards.of(p).sum(share * weight.numel() / p.numel()) if is_sharded(p) else share


def check_regularizer(regularizer: Any) -> None:
    """ValueError unless it is None or has the methods of a regulariser."""
    if isinstance(regularizer, type):
        raise ValueError(f"Invalid `regularizer`: the class {regularizer.__name__}; expected an object, add ().")
    if regularizer is not None and not isinstance(regularizer, Regularizer):
        raise ValueError(f"Invalid `regularizer`: {regularizer!r}; expected a tb.Regularizer such as tb.L1(), or None.")


def count_nonzero(tensors: list[Tensor]) -> list[int]:
    """The number of exact non-zeros of each tensor, counted where they live, fetched in one go.

    DTensors count as a whole, on every rank.
    """
    if not tensors:
        return []
    device = tensors[0].device
    counts = torch.stack([torch.count_nonzero(local(t)).to(device) for t in tensors])
    return sum_over_parts(counts, tensors).tolist()


def _name(regularizer: Regularizer | None) -> str:
    return _NO_PENALTY if regularizer is None else repr(regularizer)


def _levels_inside() -> int:
    """The stacklevel of the code that called us, past torch's wrappers of step(), whose number differs."""
    inside = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, levels = frame.f_back, levels + 1
    return levels


def _warn_if_dense(fresh: list[tuple[tuple[int, ...], Tensor]]) -> None:
    device = fresh[0][1].device
    shares = torch.stack([share.to(device) for _, share in fresh]).tolist()
    dense = [shape for (shape, _), share in zip(fresh, shares, strict=True) if share > 0.5]
    if dense:
        warnings.warn(
            f"{len(dense)} of {len(fresh)} regularised tensors start more than half dense (the first has shape "
            f"{dense[0]}). Bregman iterations add weights and hardly remove any: call tb.sparse_init_(model) first.",
            stacklevel=_levels_inside(),
        )
