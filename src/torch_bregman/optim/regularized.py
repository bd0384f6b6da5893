"""What all optimizers here share: groups with a regulariser, checks, sharded weights, state in its own precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..distributed import PLAIN, Shards, is_sharded, local
from ..regularizers import Regularizer, broadcasts, check_regularizer
from .held import check_gradient, gradient
from .onepass.plan import Plan, count_without_entries
from .onepass.plans import Plans, require, wanted
from .onepass.rule import Rule
from .options import COMMON, check_number
from .protocols import Control, Levels

_NO_PENALTY = "none"


class RegularizedOptimizer(Optimizer):
    """An optimizer whose groups carry a regulariser J and a strength λ each.

    Regularisers are objects and live beside `param_groups`, which holds plain values only. The state of a DTensor
    (`fully_shard`, tensor parallelism) is cut as it is; the steps are those of a single process.

    A subclass says how one list of tensors is updated (`_update`), and, if it has a rule for it, what the pass over
    memory needs to know (`_rule`, `_set_prox`, `_pass`). There are more methods than a class should have: six are
    torch's own.
    """

    #: Do weights come from v (LinBreg, AdaBreg), or is θ all there is (ProxSGD)?
    has_dual = False

    regularizers: list[Regularizer | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with an equation of its own does not inherit the rule of another one."""
        super().__init_subclass__(**kwargs)
        if {"_descend", "_update"} & vars(cls).keys() and "_rule" not in vars(cls):
            cls._rule = RegularizedOptimizer._rule  # type: ignore[method-assign]

    def __init__(self, params: Any, defaults: dict[str, Any], regularizer: Regularizer | None) -> None:
        check_regularizer(regularizer)
        self._default_regularizer = regularizer
        self.regularizers = []
        self.levels: Levels | None = None  # a tb.Multilevel, which exchanges weights by their live parts and back
        self.controls: list[Control] = []  # what moves λ: tb.TargetDensity
        self.steps_taken = 0  # by this object; a step that a GradScaler skips is none
        self.forget()
        missing = {name: value for name, value in COMMON.items() if name not in defaults}
        super().__init__(params, {"regularizer": _name(regularizer), **defaults, **missing, "entries_updated": 0})

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
        if param_group["fused"] and self._rule(param_group) is None:
            raise ValueError(
                f"Invalid `fused`: True; {type(self).__name__} has no rule for one pass over memory, so leave it None."
            )
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                _check_parameter(p, given, param_group)
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
        for name, value in (("levels", None), ("controls", []), ("steps_taken", 0)):
            self.__dict__.setdefault(name, value)  # a copy has none
        self.forget()
        self.defaults.pop("differentiable", None)  # torch puts it there; no option of ours
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def forget(self) -> None:
        """Parameters or their state may have been exchanged."""
        self.plans = Plans()  # what the one-pass step knows about each group
        self._on_shards: dict[Tensor, Regularizer | None] = {}  # J on this rank's part of each DTensor
        self._known: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the place of every control in its schedule, so that one that is made anew goes on."""
        found = super().state_dict()
        for control in self.controls:
            control.leave_place(found["param_groups"])
        return found

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
        for control in self.controls:
            control.take_place()

    # ------------------------------------------------------------------ the step

    @_disable_dynamo  # it would fall into a graph for each line; what is worth compiling compiles itself
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the loss and returns it. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps_taken += 1
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if _identities(active, self.state) != self._known:
            self._start()
            self.plans = Plans()
            self._known = _identities(active, self.state)
        name = type(self).__name__
        for i, (group, regularizer) in enumerate(zip(self.param_groups, self.regularizers, strict=True)):
            params = active[i]
            if wanted(group, params, self.levels) and self._one_pass(i, params, group, regularizer):
                continue
            grads = [gradient(p, group, name) for p in params]
            foreach = group["foreach"]
            if foreach is None:
                foreach = bool(params) and all(p.is_cuda for p in params)
            # One mathematics for both: a list of all tensors, or lists of one.
            for at in [slice(None)] if foreach else [slice(i, i + 1) for i in range(len(params))]:
                if params[at]:
                    self._update(params[at], grads[at], group, regularizer)
        return loss

    def _one_pass(self, i: int, params: list[Tensor], group: dict[str, Any], reg: Regularizer | None) -> bool:
        """One pass over memory for `params` of group i. False, and nothing done, where there is none for them."""
        rule = self._rule(group)
        plans = None if rule is None else self.plans.of(i, params, self.state)
        if rule is None or plans is None:
            return False
        known = [self._set_prox(plan, group, reg) for plan in plans]
        if not all(known) and not (self.has_dual and all(plan.moves_dual_alone for plan in plans)):
            return False
        for p in params:
            if not p.numel():
                count_without_entries(p, self.state[p], rule)
        check = partial(check_gradient, optimizer=type(self).__name__)
        gradients = [plan.gradients(check) for plan in plans]  # held until the pass is through
        for plan, grads, prox in zip(plans, gradients, known, strict=True):
            plan.point("GRAD", grads)
            self._pass(plan, plan.take(rule), prox, group, reg)
        return True

    # ------------------------------------------------------------------ what a subclass says

    def _start(self) -> None:
        """Create the state that is missing. Parameters without a gradient are left alone."""

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        """One step of `params`, all of one group: the equations of the method."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> Rule | None:
        """How one pass over memory does the same, in this step; None: it takes `_update`."""
        return None

    def _set_prox(self, plan: Plan, group: dict[str, Any], reg: Regularizer | None) -> bool:
        """Give the plan the prox as numbers. False where it needs more than one entry at a time."""
        raise NotImplementedError

    def _pass(self, plan: Plan, rule: str, prox: bool, group: dict[str, Any], reg: Regularizer | None) -> None:
        """Move what the method moves, and write θ. `prox`: whether the plan has the prox as numbers."""
        raise NotImplementedError

    def refresh(self, groups: Iterable[int] | None = None) -> None:
        """Write θ anew with λ and δ as they stand, where it depends on them."""

    # ------------------------------------------------------------------ weights and gradients as this rank holds them

    def local(self, p: Tensor, reg: Regularizer | None) -> tuple[Tensor, Regularizer | None]:
        """The part of `p` that this rank holds, and J on it."""
        if not is_sharded(p):
            return p, reg
        if p not in self._on_shards:
            self._on_shards[p] = None if reg is None else reg.on_shards(Shards.of(p))
        return local(p), self._on_shards[p]


def _check_parameter(p: Tensor, regularizer: Regularizer | None, group: dict[str, Any]) -> None:
    """ValueError, or ImportError, where the options of its group do not fit the parameter."""
    if group["fused"]:
        require(p)
    if getattr(p, "_is_flat_param", False) and regularizer is not None and regularizer.unit not in (None, "entry"):
        raise ValueError(
            f"Invalid `params`: FullyShardedDataParallel flattens weights, but {regularizer!r} needs their "
            "shape; use torch.distributed.fsdp.fully_shard."
        )
    if regularizer is not None:
        regularizer.check(p.shape)
    if group["fused"] and is_sharded(p):
        raise ValueError("Invalid `fused`: True; DTensors take the plain step, so leave it None.")
    for name in ("lam", "delta"):
        value = group[name]
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


def _name(regularizer: Regularizer | None) -> str:
    return _NO_PENALTY if regularizer is None else repr(regularizer)


def _identities(active: list[list[Tensor]], state: Mapping[Tensor, Any]) -> list[int]:
    """Tells whether parameters or their state have been exchanged since the last step."""
    return [id(x) for x in (*itertools.chain(*active), *state.values())]
