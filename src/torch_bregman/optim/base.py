"""What the Bregman optimizers share: checks, the dual state, and keeping θ and v together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..regularizers import Regularizer, broadcasts

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
    was last written with. Regularisers are objects and live beside `param_groups`, which holds plain values only.
    """

    #: Do weights come from v (LinBreg, AdaBreg), or is θ all there is (ProxSGD)?
    has_dual = True

    regularizers: list[Regularizer | None]

    def __init__(self, params: Any, defaults: dict[str, Any], regularizer: Regularizer | None) -> None:
        check_regularizer(regularizer)
        self._default_regularizer = regularizer
        self.regularizers = []
        super().__init__(params, {"regularizer": _name(regularizer), **defaults})

    # ------------------------------------------------------------------ groups and their options

    def _check_group(self, group: dict[str, Any]) -> None:
        """ValueError if an option of the group is out of range; subclasses add theirs."""
        check_number("lr", group["lr"])
        check_number("lam", group["lam"])
        check_number("delta", group["delta"], strict=True)
        check_number("weight_decay", group["weight_decay"])
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"Invalid `lr`: a tensor of shape {tuple(group['lr'].shape)}; expected one element.")
        if group["fused"]:
            raise ValueError("Invalid `fused`: True; there is no fused step yet, use foreach=True or None.")

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
                if given is not None:
                    given.check(p.shape)
                for name in ("lam", "delta"):
                    value = param_group[name]
                    if isinstance(value, Tensor) and not broadcasts(value.shape, p.shape):
                        raise ValueError(
                            f"Invalid `{name}`: a tensor of shape {tuple(value.shape)}; expected one that broadcasts "
                            f"against a parameter of shape {tuple(p.shape)}."
                        )
        except ValueError:
            del self.param_groups[-1]
            raise
        self.regularizers.append(given)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "regularizers": self.regularizers,
            "_default_regularizer": self._default_regularizer,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there; no option of ours
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

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
                    if name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                        self.state[p][name] = value.to(device=p.device, copy=True)

        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the loss and returns it. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._start()
        for group, regularizer in zip(self.param_groups, self.regularizers, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            grads = [self._gradient(p, group) for p in params]
            foreach = group["foreach"]
            if foreach is None:
                foreach = bool(params) and all(p.is_cuda for p in params)
            # One mathematics for both: a list of all tensors, or lists of one.
            for at in [slice(None)] if foreach else [slice(i, i + 1) for i in range(len(params))]:
                if params[at]:
                    self._update(params[at], grads[at], group, regularizer)
        return loss

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            self._follow(p, state, group, reg)
        self._descend([state["dual"] for state in states], grads, states, group)
        for p, state in zip(params, states, strict=True):
            self._write(p, state, group, reg)

    def _descend(
        self, duals: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """Move every v along its gradient, in place: the equation of the method."""
        raise NotImplementedError

    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
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
        grad = grad.to(_dual_dtype(p))
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] != 0:
            grad = grad.add(p, alpha=group["weight_decay"])  # coupled: after the prox it would be overwritten
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
                weight = p.detach().to(_dual_dtype(p))
                dual = weight / group["delta"]
                if reg is not None:
                    dual = dual + group["lam"] * reg.subgradient(weight)
                    if p.numel() and not p.is_meta:
                        fresh.append((tuple(p.shape), reg.alive(weight)))
                self.state[p]["dual"] = torch.empty_like(p, dtype=_dual_dtype(p)).copy_(dual)
                self._remember(self.state[p], group)
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

    def _follow(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer | None) -> None:
        """Where θ is not what the last step wrote, give v the value that belongs to it."""
        expected = primal(state["dual"], reg, state["lam"], state["delta"]).to(p.dtype)
        if p.device.type == "cpu" and torch.equal(expected, p):
            return  # elsewhere looking would wait for the device, so the same arithmetic runs masked
        if p.is_meta:
            return
        self._set_dual(p.to(state["dual"].dtype), expected != p, state, group, reg)

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
        # Where λ is tiny or zero all memory is out of reach; it must not become infinite.
        near = held / torch.as_tensor(lam).to(dual).clamp_min((eps * held.abs().amax()).clamp_min(tiny))
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
            for p in group["params"]:
                if "dual" in self.state.get(p, {}):
                    self._follow(p, self.state[p], group, reg)
                    self._write(p, self.state[p], group, reg)


def primal(dual: Tensor, reg: Regularizer | None, lam: float | Tensor, delta: float | Tensor) -> Tensor:
    """θ = prox_{δJ}(δv)."""
    if reg is not None and not reg.homogeneous:
        return reg.prox(dual * delta, delta * lam)
    weight = dual if reg is None else reg.prox(dual, lam)
    return weight if isinstance(delta, float | int) and delta == 1 else weight * delta


def check_regularizer(regularizer: Any) -> None:
    """ValueError unless it is None or has the methods of a regulariser."""
    if isinstance(regularizer, type):
        raise ValueError(f"Invalid `regularizer`: the class {regularizer.__name__}; expected an object, add ().")
    if regularizer is not None and not isinstance(regularizer, Regularizer):
        raise ValueError(f"Invalid `regularizer`: {regularizer!r}; expected a tb.Regularizer such as tb.L1(), or None.")


def count_nonzero(tensors: list[Tensor]) -> list[int]:
    """The number of exact non-zeros of each tensor, counted where they live, fetched in one go."""
    if not tensors:
        return []
    device = tensors[0].device
    return torch.stack([torch.count_nonzero(t).to(device) for t in tensors]).tolist()


def _name(regularizer: Regularizer | None) -> str:
    return _NO_PENALTY if regularizer is None else repr(regularizer)


def _dual_dtype(p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.float64 else torch.float32


def _warn_if_dense(fresh: list[tuple[tuple[int, ...], Tensor]]) -> None:
    device = fresh[0][1].device
    shares = torch.stack([share.to(device) for _, share in fresh]).tolist()
    dense = [shape for (shape, _), share in zip(fresh, shares, strict=True) if share > 0.5]
    if dense:
        warnings.warn(
            f"{len(dense)} of {len(fresh)} regularised tensors start more than half dense (the first has shape "
            f"{dense[0]}). Bregman iterations add weights and hardly remove any: call tb.sparse_init_(model) first.",
            stacklevel=6,  # the caller of step(), past torch's wrappers
        )
