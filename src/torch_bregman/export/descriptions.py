"""Modules that a file may put in the place of others: described by their kind and its arguments, never by code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..network import kinds

LARGEST = 1 << 31  # of an argument of a module
DEPTH = 64  # of a module in the network
NESTING = 4  # how deep Sequentials stand in each other

Description = list[Any]


class Place(NamedTuple):
    """Where a module stands: `parent._modules[leaf]`."""

    parent: nn.Module
    leaf: str
    module: nn.Module


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile was given of a part: the wrapper shows neither in names nor in descriptions."""
    while isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
        module = inner
    return module


def places(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Place]]:
    """All modules below `model` under each of their paths, parents first."""
    for leaf, child in model._modules.items():
        if child is not None:
            module = unwrapped(child)
            yield f"{prefix}{leaf}", Place(model, leaf, module)
            yield from places(module, f"{prefix}{leaf}.")


def describe(module: nn.Module) -> Description | None:
    """[kind, arguments …, {options that are not the default}], or None where files do not know its exact type.

    A Sequential of such modules is ["Sequential", their number].
    """
    if type(module) is nn.Sequential:
        children = list(module._modules.items())
        known = all(n == str(i) and c is not None and describe(unwrapped(c)) for i, (n, c) in enumerate(children))
        return ["Sequential", len(children)] if known else None
    kind = kinds.of(module)
    if kind.arguments is None:
        return None
    values = {option: _attribute(module, option, kind.dims) for option in kind.options}
    changed = {option: value for option, value in values.items() if value != kind.options[option]}
    name = kind.module_class.__name__
    found = [name, *(_attribute(module, argument, kind.dims) for argument in kind.arguments)]
    return [*found, changed] if changed else found


def _attribute(module: nn.Module, name: str, dims: int) -> Any:
    value = getattr(module, name, None)
    if name == "bias" and not isinstance(value, bool):
        return value is not None or getattr(module, "affine", True) is False  # norms have one option for both
    if isinstance(value, tuple | list):
        return value[0] if len(value) == dims and len(set(value)) == 1 else list(value)
    return value


def describe_parts(model: nn.Module) -> dict[str, Description]:
    """The descriptions of all modules of known kinds below `model`, which itself cannot be replaced in place."""
    found: dict[str, Description] = {}
    inside = None
    for path, place in places(model):
        if inside and path.startswith(inside):
            continue  # a module that is built whole; what is in it comes next in the order
        description = describe(place.module)
        if description is not None and path.count(".") <= DEPTH:
            found[path] = description
            if description[0] != "Sequential":
                inside = f"{path}."
    return found


def build(path: str, descriptions: Mapping[str, Description], depth: int = 0) -> nn.Module:
    """The module that is described, without memory (on the meta device). ValueError where that is none."""
    if path not in descriptions:
        raise ValueError(f"{short(path)} is part of a Sequential but not described")
    name, *arguments = descriptions[path]
    if name == "Sequential":
        if depth == NESTING:
            raise ValueError(f"{short(path)} is nested too deep")
        if len(arguments) != 1 or not is_count(arguments[0], len(descriptions)):
            raise ValueError(f"{short(path)} is a Sequential of {short(arguments)}")
        return nn.Sequential(*(build(f"{path}.{i}", descriptions, depth + 1) for i in range(arguments[0])))
    kind = kinds.named(name)
    if kind is None:
        raise ValueError(f"{short(path)} is of the unknown kind {short(name)}")
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    lists = [value for value in [*arguments, *options.values()] if isinstance(value, list)]
    module = None
    if (
        len(arguments) == len(kind.arguments or ())
        and options.keys() <= kind.options.keys()
        and not any(isinstance(value, str | bool) for value in arguments)
        and all(isinstance(value, bool) == isinstance(kind.options[o], bool) for o, value in options.items())
        and all(len(value) == kind.dims for value in lists if kind.dims)
    ):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers without inputs
                module = kind.module_class(
                    *map(_tuple, arguments), **{o: _tuple(value) for o, value in options.items()}
                )
        except Exception:  # whatever a constructor raises for arguments that it does not like
            module = None
    # As JSON, where 1 is not True.
    if module is None or json.dumps(describe(module)) != json.dumps(descriptions[path]):
        raise ValueError(f"no {name} can be built for {short(path)} from {short(descriptions[path][1:])}")
    return module


def is_description(value: object) -> bool:
    """[name, …] of numbers, strings and lists of numbers, with a dict of such at the end or not."""
    if not (isinstance(value, list) and value and isinstance(value[0], str)):
        return False
    arguments = [*value[1:-1], *(value[-1].values() if isinstance(value[-1], dict) else value[1:][-1:])]
    return all(
        isinstance(a, str | bool)
        or is_count(a, LARGEST)
        or (isinstance(a, list) and len(a) <= 8 and all(is_count(side, LARGEST) for side in a))
        for a in arguments
    )


def is_count(value: object, most: int) -> bool:
    """Whether it is an integer of 0 … `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def short(value: object) -> str:
    """Its representation, cut to what a sentence can hold."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
