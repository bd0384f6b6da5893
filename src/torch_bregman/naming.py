"""How a user names parameters, by type or pattern, and makes weights of those that no kind of layer knows.

A weight has a layout, a letter per dimension: o outputs, i inputs, e experts (or groups, each by itself), k the kernel.
"oi" is a Linear's, "io" that of Transformers' Conv1D, "oikk" a Conv2d's, "eio" that of experts computing x @ w[e].
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from .network import kinds

#: keys are module types or patterns of names; values layouts, "" for the usual one, None for no weight
Names = Mapping[Any, str | None] | Iterable[Any]

_MARK = "_torch_bregman_weights"  # an attribute of modules: their parameters that were named, and the layouts


class Owned(NamedTuple):
    """A parameter with all its names, and for each the module that holds it and what it calls it."""

    parameter: Tensor
    names: list[str]
    owners: list[tuple[nn.Module, str]]

    @property
    def unknown_to(self) -> list[nn.Module]:
        """The owners for which it is no weight."""
        return [module for module, name in self.owners if name not in kinds.of(module).weights(module)]

    @property
    def embedding(self) -> bool:
        """Whether a row of it is looked up for a token."""
        return any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in self.owners)

    @property
    def tied_embedding(self) -> bool:
        """Whether it would be a weight if it were no embedding."""
        return self.embedding and len(self.unknown_to) < len(self.owners)

    @property
    def marks(self) -> list[str | None]:
        """What it was named as, by its owners."""
        return [marked(module)[name] for module, name in self.owners if name in marked(module)]

    @property
    def excluded(self) -> bool:
        """Whether it was named as no weight."""
        return None in self.marks

    @property
    def counted(self) -> bool:
        """Whether it is a weight: known to its layer and no embedding, or named."""
        marks = self.marks
        return None not in marks and bool(marks or (len(self.unknown_to) < len(self.owners) and not self.embedding))


def owned_parameters(model: nn.Module) -> dict[int, Owned]:
    """Every parameter of `model` once, by its id, in the order of `model.parameters()`."""
    found: dict[int, Owned] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owned = found.setdefault(id(parameter), Owned(parameter, [], []))
                owned.names.append(f"{prefix}.{name}" if prefix else name)
                owned.owners.append((module, name))
    return found


def marked(module: nn.Module) -> Mapping[str, str | None]:
    """The parameters of a module that a user named, and their layouts."""
    return module.__dict__.get(_MARK, {})


def mark(owned: Owned, layout: str | None) -> None:
    """Remember it as a weight, or with None as none; copies of the model remember it too."""
    for module, name in owned.owners:
        module.__dict__[_MARK] = {**marked(module), name: layout}


def reaches(key: Any, owned: Owned, *, anything: bool = False) -> bool:
    """Whether a key means this parameter.

    A weight is meant by a type of its layers, or a pattern of its name or its layer's. Any other has to be named more
    closely, so that "fc*" leaves biases alone and nn.Linear an embedding that is tied to the head: by a pattern that
    ends in a letter or digit, or by the type of the module to which it is no weight. `anything`: "*" means all.
    """
    matrix = owned.parameter.dim() > 1
    if isinstance(key, type):
        if owned.counted:
            return any(isinstance(module, key) for module, _ in owned.owners)
        return matrix and key is not nn.Module and any(isinstance(module, key) for module in owned.unknown_to)
    if owned.counted or anything:
        return any(fnmatchcase(n, key) or fnmatchcase(n.rpartition(".")[0], key) for n in owned.names)
    layers = [n.rpartition(".")[0] for n in owned.names] if matrix else []
    return key[-1:].isalnum() and any(fnmatchcase(n, key) for n in (*owned.names, *layers))


def lookup(choices: Mapping[Any, Any], owned: Owned, *, anything: bool = False) -> Any:
    """The value of the first key that means this parameter, or None."""
    return next((value for key, value in choices.items() if reaches(key, owned, anything=anything)), None)


def check_keys(choices: Mapping[Any, Any], parameters: Iterable[Owned], argument: str) -> None:
    """ValueError where a key is neither type nor pattern, or means nothing."""
    parameters = list(parameters)
    known = sorted({name for owned in parameters for n in owned.names for name in (n, n.rpartition(".")[0]) if name})
    for key, value in choices.items():
        if isinstance(key, type):
            if not _meant(key, parameters):
                raise ValueError(f"Invalid `{argument}`: {key.__name__} matches no layer of the model.")
        elif not isinstance(key, str):
            raise ValueError(f"Invalid key {key!r}: expected a module type or a pattern of parameter names.")
        elif not _meant(key, parameters):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"The pattern {key!r} matches no parameter of the model{hint}")
        if value is None:
            continue
        # An embedding that is tied to a head stays as it is where the key means heads.
        if not any(o.tied_embedding or reaches(key, o, anything=argument == "lam") for o in _meant(key, parameters)):
            raise ValueError(_reaches_nothing(key, parameters, argument))


def _meant(key: Any, parameters: list[Owned]) -> list[Owned]:
    """All parameters of the layers that a key matches."""
    if isinstance(key, type):
        return [owned for owned in parameters if any(isinstance(module, key) for module, _ in owned.owners)]
    return [
        o for o in parameters if any(fnmatchcase(n, key) or fnmatchcase(n.rpartition(".")[0], key) for n in o.names)
    ]


def _reaches_nothing(key: Any, parameters: list[Owned], argument: str) -> str:
    meant = _meant(key, parameters)
    shown = key.__name__ if isinstance(key, type) else repr(key)
    hint = f"; to reach {meant[0].names[0]}, give its whole name" if meant else ""
    return f"Invalid `{argument}`: {shown} reaches no weight{hint}."


def name_weights(model: nn.Module, weights: Names | None) -> None:
    """Make weights of what the keys of `weights` mean, from now on and for all functions.

    Raises:
        ValueError: a key that means nothing, or a layout that does not fit.
    """
    if weights is None:
        return
    if isinstance(weights, str | type):
        raise ValueError(f"Invalid `weights`: {weights!r}; expected a list or a mapping of types and patterns.")
    choices: Mapping[Any, str | None] = weights if isinstance(weights, Mapping) else dict.fromkeys(weights, "")
    parameters = owned_parameters(model)
    check_keys(choices, parameters.values(), "weights")
    for key, layout in choices.items():
        _check_layout(key, layout)
        fits = [o for o in parameters.values() if reaches(key, o) and len(layout or "") in (0, o.parameter.dim())]
        if layout and not fits:
            shapes = [tuple(owned.parameter.shape) for owned in parameters.values() if reaches(key, owned)]
            raise ValueError(
                f"Invalid `weights`: {layout!r} for {key!r}, of shape {shapes[0]}; expected a letter per dimension."
            )
    for owned in parameters.values():
        for key, layout in choices.items():
            if reaches(key, owned) and len(layout or "") in (0, owned.parameter.dim()):
                if layout is None or owned.parameter.dim() > 1:
                    mark(owned, layout)
                break


def _check_layout(key: Any, layout: Any) -> None:
    if layout is None or layout == "":
        return
    letters = set(layout) if isinstance(layout, str) else set()
    once = isinstance(layout, str) and all(layout.count(letter) <= 1 for letter in "eoi")
    if not once or not {"o", "i"} <= letters <= set("eoik"):
        raise ValueError(
            f"Invalid `weights`: {layout!r} for {key!r}; expected a letter per dimension, such as 'oi', 'io' or 'eio': "
            "o outputs, i inputs, e experts, k kernel."
        )


def usual_layout(dims: int) -> str:
    """[outputs, inputs, *kernel], as most layers have it."""
    return ("oi" + "k" * (dims - 2))[:dims]


def grouped(layout: str, tensor: Tensor) -> Tensor:
    """A tensor as [experts, outputs, inputs, kernel size]. It may lack the dimensions of the kernel."""
    places = [[d for d in range(tensor.dim()) if layout[d] == letter] for letter in "eoik"]
    sizes = [[tensor.shape[d] for d in some] for some in places]
    moved = tensor.permute([d for some in places for d in some])
    shape = [some[0] if some else 1 for some in sizes[:3]]
    kernel = 1
    for size in sizes[3]:
        kernel *= size
    return moved.reshape(*shape, kernel)
