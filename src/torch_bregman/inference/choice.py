"""Dense or sparse, and which way through a chain: decided by timing both on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compare import close
from ..layers import weight_layers
from ..timing import race
from .chain import WAYS, Chain
from .links import Unfit, sample
from .report import LayerChoice
from .sites import TOLERANCE, MakeChain, Site

FASTER_BELOW = 0.97  # a way is taken if it needs less than this share of the other's time: nearer is noise
SECONDS = 0.2  # spent on one comparison


def seconds_of(
    jobs: dict[str, Callable[[], object]], seconds: float | None = None, of: Callable[[list[float]], float] = min
) -> dict[str, float]:
    """Seconds of a call of each: the least, for what else the machine does only adds."""
    times = race(jobs, 2, seconds=SECONDS if seconds is None else seconds)
    return {name: of([second for row in rows for second in row]) for name, rows in times.items()}


def seconds_of_networks(networks: dict[str, nn.Module], inputs: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of a call of each, for which twice the time is taken."""
    return seconds_of({name: lambda n=n: n(*inputs) for name, n in networks.items()}, 2 * SECONDS)  # type: ignore[misc]


def _fastest_chain(modules: list[nn.Module], x: Tensor) -> Chain:
    """The chain of these modules that is the fastest for such an input; `Unfit` if there is none."""
    reason = "no way through it"
    wanted, chains = nn.Sequential(*modules)(x.clone()), dict[str, Chain]()
    for way in WAYS:
        try:
            chain = Chain(modules, sample(modules[0], x), way)
        except Unfit as error:
            reason = str(error)
            continue
        if close(chain(x), wanted, TOLERANCE):
            chains[way] = chain
            if chain.spreads(x.shape):
                chains[f"{way}, alone"] = Chain(modules, chain.shape, way, False)
        else:
            reason = f"the result differs by more than {TOLERANCE:.0e} of the largest output"
    if not chains:
        raise Unfit(reason)
    jobs: Any = {way: lambda chain=chain: chain(x) for way, chain in chains.items()}
    seconds = seconds_of(jobs, of=statistics.median)  # not the least: where cores are shared, threads often wait
    return chains[min(seconds, key=seconds.__getitem__)]


def fastest_chains() -> MakeChain:
    """The fastest chain of some modules for an input, found once for the same modules; `Unfit` if there is none."""
    found: dict[tuple[int, ...], Chain] = {}

    def fastest(modules: list[nn.Module], x: Tensor) -> Chain:
        key = tuple(map(id, modules))
        if key not in found:
            found[key] = _fastest_chain(modules, x)
        return found[key]

    return fastest


def choose(site: Site, reason: str, fastest: MakeChain) -> LayerChoice:
    """Dense or sparse, for this layer alone."""
    weight: Tensor = site.module.weight  # type: ignore[assignment]
    what = site.name, tuple(weight.shape), torch.count_nonzero(weight).item() / max(1, weight.numel())
    reason = reason or site.why
    if not reason and site.link is not None and site.x is not None:
        modules, x = site.link.modules, site.x
        try:
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise Unfit(f"the input is {x.dtype} on {x.device}; the kernels need float32 on a CPU")
            dense, chain = nn.Sequential(*modules), fastest(modules, x)
        except Unfit as error:
            reason = str(error)
        else:
            took = seconds_of({"dense": lambda: dense(x), "sparse": lambda: chain(x)})
            a, b = took["dense"], took["sparse"]
            faster = b < FASTER_BELOW * a
            why = f"sparse is {a / b:.1f} times as fast" if faster else f"sparse takes {b / a:.1f} times as long"
            return LayerChoice(*what, a, b, "sparse" if faster else "dense", why)
    return LayerChoice(*what, None, None, "dense", reason)


def left_out(model: nn.Module, sites: Iterable[Site]) -> Iterator[LayerChoice]:
    """The weights of `model` that are those of no site, which stay dense, and why."""
    found = {site.name for site in sites}
    inside = {name.rpartition(".")[0] for name in found}  # of an attention its parts
    for layer in weight_layers(model):
        name, kind = layer.name.removesuffix(".weight"), type(layer.module).__name__
        if name not in found and layer.name.rpartition(".")[0] not in inside:
            plain = isinstance(layer.module, nn.Linear | nn.Conv2d)
            why = f"it is not called as a {kind}" if plain else f"there is no sparse product for {kind}"
            weight = layer.weight
            density = torch.count_nonzero(weight).item() / max(1, weight.numel())
            yield LayerChoice(name, tuple(weight.shape), density, None, None, "dense", why)


def settled(choice: LayerChoice, sparse: bool) -> LayerChoice:
    """The choice that the whole network made of it."""
    chosen = "sparse" if sparse else "dense"
    if chosen == choice.chosen:
        return choice
    return replace(choice, chosen=chosen, why=f"{choice.why} alone, but the whole is faster this way")
