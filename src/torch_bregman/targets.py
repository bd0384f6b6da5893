"""Which weights count for a target of density, and the λ of which groups is moved for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .density import check_density
from .layers import weight_layers
from .optim import RegularizedOptimizer
from .warned import warn


def targets(
    optimizer: RegularizedOptimizer, density: float | Sequence[float | None], model: nn.Module | None
) -> Iterable[tuple[float, list[int], list[Tensor], list[int]]]:
    """(density, groups whose λ is moved, weights that count, groups whose λ follows) of each target."""
    groups, regularizers = optimizer.param_groups, optimizer.regularizers
    if model is not None:
        counted = {id(layer.weight) for layer in weight_layers(model)}
    elif any("counted" in group for group in groups):
        counted = {id(p) for group in groups if group.get("counted", False) for p in group["params"]}
    else:
        every = [p for group in groups for p in group["params"] if p.dim() > 1]
        known = [p for p in every if hasattr(p, "_counted")]
        counted = {id(p) for p in known or every}
        if len(known) < len(every) and known:
            _warn_outside(optimizer, counted)
    weights = [[p for p in group["params"] if id(p) in counted] for group in groups]
    moved = [i for i, reg in enumerate(regularizers) if reg is not None and weights[i]]
    positive = [i for i in moved if any_positive(groups[i]["lam"])]
    if isinstance(density, Sequence) and not isinstance(density, str):
        if len(density) != len(groups):
            raise ValueError(f"`density` has {len(density)} entries; expected one per parameter group, {len(groups)}.")
        for i, wanted in enumerate(density):
            if wanted is not None:
                check_density(wanted, name=f"density[{i}]")
                if i not in moved:
                    raise ValueError(f"Invalid `density[{i}]`: {wanted!r}; that group has no regularised weights.")
                yield wanted, [i], weights[i], []
        return
    check_density(density)
    if not moved:
        raise ValueError("`optimizer` regularises no weights, so there is no λ to move; see tb.param_groups.")
    # A group with λ = 0 beside others with λ > 0 was left unregularised on purpose.
    # A group without weights that count, and without a λ of its own, takes that of the others.
    others = (i for i, reg in enumerate(regularizers) if reg is not None and i not in moved)
    also = [] if positive else [i for i in others if not any_positive(groups[i]["lam"])]
    yield density, positive or moved, [p for some in weights for p in some], also


def _warn_outside(optimizer: RegularizedOptimizer, counted: set[int]) -> None:
    """Say which penalised matrices the density does not count, where the groups were not made to fit it."""
    groups, regularizers = optimizer.param_groups, optimizer.regularizers
    penalised = [p for g, reg in zip(groups, regularizers, strict=True) if reg is not None for p in g["params"]]
    outside = [p.numel() for p in penalised if p.dim() > 1 and id(p) not in counted]
    if outside:
        warn(
            f"`optimizer` penalises {len(outside)} matrices ({sum(outside):,} entries) that tb.density does not "
            "count, such as embeddings; make its groups by tb.param_groups(model, …) to leave them alone."
        )


def any_positive(lam: float | Tensor) -> bool:
    """Whether a λ, of one number or many, has been given."""
    return bool((lam > 0).any()) if isinstance(lam, Tensor) else lam > 0
