"""What several test files share: tables of cases, a regulariser of one's own, and few of many combinations."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_bregman as tb

# ---------------------------------------------------------------------- few combinations of many options

Row = tuple[Any, ...]


def covering(rows: list[Row], strength: int = 2) -> list[Row]:
    """Some of `rows`, in which every pair of values (`strength` of them) meets that meets in any row; in their order.

    Greedy: the row with most pairs that are still missing comes next; of equals the one whose values came least often,
    then the first. So the choice is the same everywhere, and is near the fewest rows that there can be.
    """
    number: dict[Row, int] = {}
    masks = []  # of every row, a bit for each of its pairs
    for row in rows:
        pairs = itertools.combinations(enumerate(row), min(strength, len(row)))
        masks.append(sum(1 << number.setdefault(pair, len(number)) for pair in pairs))
    missing, chosen, used = (1 << len(number)) - 1, [], Counter[tuple[int, Any]]()
    while missing:
        new = [(mask & missing).bit_count() for mask in masks]
        best = [k for k, count in enumerate(new) if count == max(new)]
        k = min(best, key=lambda k: sum(used[value] for value in enumerate(rows[k])))
        missing &= ~masks[k]
        used.update(enumerate(rows[k]))
        chosen.append(k)
    return [rows[k] for k in sorted(chosen)]


def label(name: str, value: Any) -> str:
    """What an id says of a value of the argument `name`."""
    if value is None or isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, int | float):
        return f"{name}{value}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(getattr(value, "name", getattr(value, "__name__", value))).removeprefix("torch.").replace(" ", "_")


def pairwise(
    options: Mapping[str, Mapping[str, Any] | Iterable[Any]],
    *,
    where: Callable[..., bool] = lambda **_: True,
    slow: Callable[..., bool] = lambda **_: False,
    strength: int = 2,
    indirect: Sequence[str] = (),
) -> pytest.MarkDecorator:
    """Parametrise a test with few combinations of `options`, in which every two values meet that may.

    `options`: argument → its values, or id → value; "cls,options" → tuples of values that belong together.
    `where` and `slow` get a combination by the names of its arguments: whether there is such a case, and whether it
    waits for `-m slow` (the others cover their pairs without it). `strength=3`: every three values meet. `indirect`:
    the arguments that are fixtures.
    """
    names = ",".join(options).split(",")
    columns: list[list[tuple[str, tuple[Any, ...]]]] = []
    for name, values in options.items():
        given = values.items() if isinstance(values, Mapping) else [(label(name, value), value) for value in values]
        columns.append([(words, value if "," in name else (value,)) for words, value in given])

    def arguments(row: Row) -> list[Any]:
        return [value for column, k in zip(columns, row, strict=True) for value in column[k][1]]

    rows: dict[bool, list[Row]] = {False: [], True: []}
    for row in itertools.product(*(range(len(column)) for column in columns)):
        case = dict(zip(names, arguments(row), strict=True))
        if where(**case):
            rows[slow(**case)].append(row)
    params = []
    for waits, found in rows.items():
        for row in covering(found, strength):
            words = "-".join(column[k][0] for column, k in zip(columns, row, strict=True))
            params.append(pytest.param(*arguments(row), id=words, marks=[pytest.mark.slow] if waits else []))
    return pytest.mark.parametrize(names, params, indirect=indirect)


FLOATS = {"float32": torch.float32, "float64": torch.float64}
PATHS = {"forloop": False, "foreach": True}

# ---------------------------------------------------------------------- optimizers

RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "linbreg": (tb.LinBreg, {}),
    "linbreg-paper": (tb.LinBreg, {"momentum": 0.9}),
    "linbreg-sgd": (tb.LinBreg, {"momentum": 0.9, "momentum_rule": "sgd"}),
    "linbreg-nesterov": (tb.LinBreg, {"momentum": 0.9, "momentum_rule": "sgd", "nesterov": True}),
    "adabreg": (tb.AdaBreg, {}),
    "adabreg-decoupled": (tb.AdaBreg, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    "proxsgd": (tb.ProxSGD, {}),
    "proxsgd-momentum": (tb.ProxSGD, {"momentum": 0.9}),
    "proxsgd-nesterov": (tb.ProxSGD, {"momentum": 0.9, "nesterov": True}),
}


def with_rates(rates: Mapping[str, float]) -> dict[str, tuple[type, dict[str, Any]]]:
    """Those of `RULES` that have a step size here."""
    return {kind: (RULES[kind][0], {"lr": lr, **RULES[kind][1]}) for kind, lr in rates.items()}


# ---------------------------------------------------------------------- regularisers


@dataclass(frozen=True)
class ElasticNet(tb.Regularizer):
    """J = λ Σ (|θ| + μθ²/2): a user's own regulariser, not homogeneous, with nothing but the three methods."""

    mu: float = 0.5

    def value(self, weight: Tensor, lam: float | Tensor = 1.0) -> Tensor:
        return (lam * (weight.abs() + 0.5 * self.mu * weight.square())).sum()

    def prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        return x.sign() * (x.abs() - step).clamp_min(0) / (1 + step * self.mu)

    def subgradient(self, weight: Tensor) -> Tensor:
        return weight.sign() + self.mu * weight


ENTRYWISE: dict[str, Callable[[], tb.Regularizer | None]] = {
    "none": lambda: None,
    "l1": tb.L1,
    "nonnegative": tb.NonNegativeL1,
}


def labels(groups: str, shape: tuple[int, ...]) -> np.ndarray:
    """The group number of every entry, from the definition of each grouping."""
    at = np.indices(shape)
    out, inputs = at[0], at[1]
    return {
        "rows": out,
        "columns": inputs,
        "kernels": out * shape[1] + inputs,
        "filters": out,
        "channels": inputs,
        "index": (out * 7 + inputs * 3 + at[-1] * 5) % 4,
        "index of rows": np.broadcast_to(out // 2, shape),
    }[groups]


# ---------------------------------------------------------------------- saving and comparing


def through_disk(thing: Any, *, weights_only: bool = True) -> Any:
    """`thing` as it comes back from a file."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def same(a: Tensor, b: Tensor) -> None:
    """Equal to the last bit."""
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)
