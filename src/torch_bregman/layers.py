"""Which parameters are weights: the tensors that are made sparse, started, counted, controlled and reported alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .naming import Names, check_keys, grouped, lookup, mark, marked, name_weights, owned_parameters, usual_layout
from .network import kinds
from .network.reparametrised import reparametrised, warn_reparametrised
from .regularizers import L1, Regularizer, check_regularizer
from .warned import warn

MOST_UNCOUNTED = 0.2  # of all matrix entries; beyond it `param_groups` warns


class LayerWeight(NamedTuple):
    """A weight under its full parameter name, and the layer that it belongs to."""

    name: str
    module: nn.Module
    weight: Tensor

    @property
    def _own(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def layout(self) -> str | None:
        """A letter per dimension (see `naming`); None where only the kind of its layer can tell."""
        kind, named = kinds.of(self.module), marked(self.module).get(self._own)
        if named or self._own not in kind.weights(self.module):
            return named or usual_layout(self.weight.dim())
        return kind.layout(self.module, self._own)

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, of experts, and no convolution."""
        return "e" in (self.layout or "")

    def grouped(self, tensor: Tensor) -> Tensor:
        """A tensor that lies like the weight as [groups, outputs / groups, inputs / groups, kernel size].

        A view where possible. `tensor` may lack the dimensions of the kernel.
        """
        if self.layout is not None:
            return grouped(self.layout, tensor)
        return kinds.of(self.module).grouped(self.module, self._own, tensor)

    @property
    def fan_in(self) -> float:
        """How many inputs an output of the layer sums over."""
        if self.layout is None:
            return kinds.of(self.module).fan_in(self.module, self._own)
        return math.prod(n for n, letter in zip(self.weight.shape, self.layout, strict=True) if letter in "ik")

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds to its outputs, where the kind of the layer knows."""
        if self._own not in kinds.of(self.module).weights(self.module):
            return None
        return kinds.of(self.module).bias(self.module, self._own)


def weight_layers(model: nn.Module, *, tied: bool = False) -> Iterator[LayerWeight]:
    """The weights of `model` in the order of its modules: of all kinds of layers that have some, and those named.

    A weight that is also an embedding is none, unless it was named. A tied weight appears once, for the first of its
    layers; with `tied` for each of them.
    """
    parameters = owned_parameters(model)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        known = kinds.of(module).weights(module)
        for name in (*known, *(name for name in marked(module) if name not in known)):
            weight = module._parameters.get(name)
            if weight is None or not parameters[id(weight)].counted or (id(weight) in seen and not tied):
                continue
            owned = parameters[id(weight)]
            if name not in known and len(owned.unknown_to) < len(owned.owners):
                continue  # one of its layers knows it, and so how it lies
            seen.add(id(weight))
            yield LayerWeight(f"{prefix}.{name}" if prefix else name, module, weight)


class Uncounted(NamedTuple):
    """A matrix that is no weight, and why."""

    name: str
    entries: int
    why: str
    said: bool  # by the user, or in another warning


def matrix_entries(model: nn.Module) -> tuple[int, int, list[Uncounted]]:
    """Entries of all weights, of all parameters with two dimensions or more, and those that are no weights."""
    counted, every, outside = 0, 0, []
    computed = {id(part) for one in reparametrised(model) for part in one.module.modules()}
    for owned in owned_parameters(model).values():
        size = owned.parameter.numel()
        if owned.counted:
            counted, every = counted + size, every + size
        elif owned.parameter.dim() > 1:
            every += size
            also = [n for n, (m, own) in zip(owned.names, owned.owners, strict=True) if own in kinds.of(m).weights(m)]
            why = f"of {type(owned.owners[0][0]).__name__}"
            if owned.excluded:
                why = "left out by name"
            elif owned.embedding:
                why = f"an embedding, also {also[0]}" if also else "an embedding"
            said = owned.excluded or any(id(module) in computed for module, _ in owned.owners)
            outside.append(Uncounted(owned.names[0], size, why, said))
    return counted, every, sorted(outside, key=lambda one: -one.entries)


@torch.no_grad()
def forward_flops(model: nn.Module, inputs: tuple[Tensor, ...], *, zeros: bool = True) -> dict[str, int]:
    """Floating-point operations of every layer in a call of `model` on `inputs`: 2 · weights · positions, by name.

    The model is called as it is. Without `zeros` only live weights are counted.
    """
    counts: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        kind = kinds.of(module)
        if kind is kinds.UNKNOWN:
            continue

        def add(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any, name: str = name,
            kind: kinds.Kind = kind,
        ) -> None:  # fmt: skip
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            flops = 0 if x is None else kind.flops(module, x.shape, zeros=zeros)
            if flops:
                counts[name] = counts.get(name, 0) + flops

        hooks.append(module.register_forward_hook(add, with_kwargs=True))
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def param_groups(
    model: nn.Module,
    regularizer: Regularizer | Mapping[Any, Regularizer | None] | None = L1(),  # noqa: B008 - frozen
    lam: float | Tensor | Mapping[Any, float | Tensor] = 0.0,
    *,
    weights: Names | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of this library: weights regularised, all else not.

    Weights are those of Linear, Conv, attention, Transformers' Conv1D, stacks of experts, the kinds that were
    registered (docs/layers.md), and whatever matrix is named, here or in `weights`: what is named is a weight from then
    on for all functions, and copies of the model know it too. A weight that is also an embedding is none unless named.

    Args:
        model: the network; tied parameters appear once.
        regularizer: for every weight. A mapping chooses per layer, first match wins: its keys are module types
            (`{nn.Linear: tb.L1(), nn.Conv2d: tb.GroupL1("kernels")}`) or patterns of parameter or module names
            (`{"head.*": None, "*": tb.L1()}`). A parameter that is no weight by itself is reached by the type of its
            module, or a pattern that ends in a letter or digit ("*.weight_ih_l0", "lm_head"). Vectors that are named
            are penalised, and not counted.
        lam: λ, or a mapping of the same kind.
        weights: names further weights: a list of types and patterns, or a mapping to their layouts, a letter per
            dimension: `{MyLinear: "io", "*.experts.w1": "eio"}` with o outputs, i inputs, e experts, k kernel; None for
            what shall be no weight. Named groups such as "rows" follow the tensor as it lies.
        options: anything else for the groups, such as `lr` or `delta`.

    Returns:
        One group per (regularizer, λ), those with a regulariser first. `counted` marks the weights, the ones that
        `tb.density` counts.

    Raises:
        ValueError: a key that reaches nothing, or a regulariser that does not fit a weight's shape.

    Warns:
        where over a fifth of the matrix entries is neither a weight nor left out by name, and where layers are passed
        over because torch's parametrizations or pruning compute their weights.
    """
    name_weights(model, weights)
    parameters = owned_parameters(model)
    if not parameters:
        raise ValueError("`model` has no parameters.")
    for argument, choice in (("regularizer", regularizer), ("lam", lam)):
        if isinstance(choice, Mapping):
            check_keys(choice, parameters.values(), argument)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    stacked = {id(layer.weight) for layer in weight_layers(model) if layer.stacked}
    for owned in parameters.values():
        parameter = owned.parameter
        if isinstance(regularizer, Mapping):
            chosen = lookup(regularizer, owned)
        else:
            chosen = regularizer if owned.counted else None
        if chosen is not None:
            _check_fit(chosen, owned.names[0], parameter, id(parameter) in stacked)
            if parameter.dim() > 1 and not owned.counted and not owned.excluded:
                mark(owned, "")
        strength = lookup(lam, owned, anything=True) if isinstance(lam, Mapping) else lam
        strength = 0.0 if strength is None or chosen is None else strength
        counted = owned.counted
        key = (chosen is None, not counted, id(chosen), id(strength) if isinstance(strength, Tensor) else strength)
        group = groups.setdefault(
            key, {"params": [], "regularizer": chosen, "lam": strength, "counted": counted, **options}
        )
        group["params"].append(parameter)
    note_weights(model)
    named = [] if not isinstance(regularizer, Mapping) else [key for key, value in regularizer.items() if value is None]
    _warn_uncounted(model, named)
    warn_reparametrised(model)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]


def _check_fit(chosen: Any, name: str, parameter: Tensor, stacked: bool) -> None:
    """ValueError, naming the parameter, where `chosen` is no regulariser or none for this shape."""
    try:
        check_regularizer(chosen)
    except ValueError:
        raise ValueError(f"Invalid `regularizer` for {name}: {chosen!r}; expected a tb.Regularizer or None.") from None
    try:
        chosen.check(parameter.shape)
    except ValueError as error:
        raise ValueError(
            f"{chosen!r} does not fit {name}: {error} A mapping chooses per layer, for example "
            "{nn.Linear: tb.L1(), nn.Conv2d: tb.GroupL1('kernels')}."
        ) from None
    if stacked and chosen.unit not in (None, "entry", "group"):
        raise ValueError(
            f"{chosen!r} does not fit {name}, a stack of matrices {tuple(parameter.shape)}, one per expert; give the "
            "numbers of the groups as a tensor, or tb.L1()."
        )


def note_weights(model: nn.Module) -> None:
    """Note on the tensors which of them count, for controls of an optimizer that was made without `param_groups`."""
    for owned in owned_parameters(model).values():
        if owned.counted:
            owned.parameter._counted = True  # type: ignore[attr-defined]
        elif hasattr(owned.parameter, "_counted"):
            del owned.parameter._counted


def _warn_uncounted(model: nn.Module, left: list[Any]) -> None:
    counted, every, outside = matrix_entries(model)
    by_name = {owned.names[0]: owned for owned in owned_parameters(model).values()}
    left_out = dict.fromkeys(left, True)
    outside = [one for one in outside if not (one.said or lookup(left_out, by_name[one.name]))]
    entries = sum(one.entries for one in outside)
    if entries > MOST_UNCOUNTED * every:
        largest = ", ".join(f"{one.name} ({one.why}; {one.entries:,})" for one in outside[:3])
        name = outside[0].name
        warn(
            f"{counted:,} of {every:,} matrix entries are weights; {entries / every:.0%} are neither made sparse nor "
            f"counted, the largest: {largest}. Name them in `weights`, as in weights=[{name!r}], or with None to leave "
            f"them dense without this warning, as in weights={{{name!r}: None}}."
        )
