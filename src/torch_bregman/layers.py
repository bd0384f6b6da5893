"""Which parameters are weights: the layers that are made sparse, and how a choice per layer is written down."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .network import kinds
from .regularizers import L1, Regularizer, check_regularizer


class LayerWeight(NamedTuple):
    """A weight under its full parameter name, and the layer that it belongs to."""

    name: str
    module: nn.Module
    weight: Tensor

    def grouped(self, tensor: Tensor) -> Tensor:
        """A tensor that lies like the weight as [groups, outputs / groups, inputs / groups, kernel size].

        A view where possible. `tensor` may lack the dimensions of the kernel.
        """
        return kinds.of(self.module).grouped(self.module, self.name.rpartition(".")[2], tensor)

    @property
    def fan_in(self) -> float:
        """How many inputs an output of the layer sums over."""
        return kinds.of(self.module).fan_in(self.module, self.name.rpartition(".")[2])

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds to its outputs."""
        return kinds.of(self.module).bias(self.module, self.name.rpartition(".")[2])


def weight_layers(model: nn.Module, *, tied: bool = False) -> Iterator[LayerWeight]:
    """The weights of `model`, of Linear, Conv and all kinds that have some, in the order of its modules.

    A tied weight appears once, for the first of its layers; with `tied` for each of them.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name in kinds.of(module).weights(module):
            weight = module._parameters[name]
            if weight is not None and (tied or id(weight) not in seen):
                seen.add(id(weight))
                yield LayerWeight(f"{prefix}.{name}" if prefix else name, module, weight)


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


def lookup(choices: Mapping[Any, Any], names: list[str], layer: LayerWeight | None, *, anything: bool = False) -> Any:
    """The value of the first key that matches one of the `names` of a parameter, or None.

    For a layer's weight a key is a module type or a pattern of its parameter or module name. Any other parameter is
    reached only by a pattern of its whole name that ends in a letter or digit, so that "fc*" leaves biases alone, or,
    with `anything`, by all.
    """
    for key, value in choices.items():
        if isinstance(key, type):
            matches = layer is not None and isinstance(layer.module, key)
        elif layer is not None or anything:
            matches = any(fnmatchcase(n, key) or fnmatchcase(n.rpartition(".")[0], key) for n in names)
        else:
            matches = key[-1:].isalnum() and any(fnmatchcase(n, key) for n in names)
        if matches:
            return value
    return None


def param_groups(
    model: nn.Module,
    regularizer: Regularizer | Mapping[Any, Regularizer | None] | None = L1(),  # noqa: B008 - frozen
    lam: float | Tensor | Mapping[Any, float | Tensor] = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of this library: Linear and Conv weights regularised, all else not.

    Args:
        model: the network; tied parameters appear once.
        regularizer: for every weight, those of Linear, Conv and the kinds that were registered (docs/layers.md). A
            mapping chooses per layer, first match wins: its keys are module types (`{nn.Linear: tb.L1(), nn.Conv2d:
            tb.GroupL1("kernels")}`) or patterns of parameter or module names (`{"head.*": None, "*": tb.L1()}`). A
            pattern that ends in a name ("*.in_proj_weight") also reaches parameters that are no such weight.
        lam: λ, or a mapping of the same kind.
        options: anything else for the groups, such as `lr` or `delta`.

    Returns:
        One group per (regularizer, λ), those with a regulariser first. `counted` marks the Linear and Conv weights, the
        ones that `tb.density` counts.

    Raises:
        ValueError: a pattern that matches nothing, or a regulariser that does not fit a weight's shape.
    """
    layers = {id(layer.weight): layer for layer in weight_layers(model)}
    parameters = list(model.named_parameters())
    if not parameters:
        raise ValueError("`model` has no parameters.")
    names: dict[int, list[str]] = {}  # a tied weight has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for choice in (regularizer, lam):
        if isinstance(choice, Mapping):
            _check_patterns(choice, [name for some in names.values() for name in some])
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters:
        layer = layers.get(id(parameter))
        if isinstance(regularizer, Mapping):
            chosen = lookup(regularizer, names[id(parameter)], layer)
        else:
            chosen = regularizer if layer is not None else None
        if chosen is not None:
            try:
                check_regularizer(chosen)
            except ValueError:
                raise ValueError(
                    f"Invalid `regularizer` for {name}: {chosen!r}; expected a tb.Regularizer or None."
                ) from None
            try:
                chosen.check(parameter.shape)
            except ValueError as error:
                raise ValueError(
                    f"{chosen!r} does not fit {name}: {error} A mapping chooses per layer, for example "
                    "{nn.Linear: tb.L1(), nn.Conv2d: tb.GroupL1('kernels')}."
                ) from None
        strength = lookup(lam, names[id(parameter)], layer, anything=True) if isinstance(lam, Mapping) else lam
        strength = 0.0 if strength is None or chosen is None else strength
        key = (chosen is None, layer is None, id(chosen), id(strength) if isinstance(strength, Tensor) else strength)
        group = groups.setdefault(
            key, {"params": [], "regularizer": chosen, "lam": strength, "counted": layer is not None, **options}
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]


def _check_patterns(choices: Mapping[Any, Any], names: list[str]) -> None:
    known = {*names, *(name.rpartition(".")[0] for name in names)}
    for key in choices:
        if isinstance(key, str) and not any(fnmatchcase(name, key) for name in known):
            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"The pattern {key!r} matches no parameter of the model{hint}")
        if not isinstance(key, str | type):
            raise ValueError(f"Invalid key {key!r}: expected a module type or a pattern of parameter names.")
