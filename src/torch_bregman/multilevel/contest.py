"""Who computes in a coarse phase: dense layers, sparse ones, or a compact network. Decided by timing them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..network.graph import Graph, Untraceable
from ..part import Part
from . import choice as choosing
from .averages import LiveGradientAverage
from .choice import Choice, Timings
from .compact import CompactNetwork
from .exchange import Exchange
from .hooks import hooked, looked_at, parts, silent
from .layers import WatchedLayer
from .live import Live
from .modules import WatchedModules
from .supports import Candidate


class Contest:
    """Chooses how the layers compute, and makes the compact network.

    Args:
        exchange, modules: the weights of the optimizer, and the network.
        averages: where there are ranks, which all go by the first one's timings.

    Attributes:
        choices: how each layer computes in the coarse phase, and the timings behind it.
        timings: what was measured.
        notes: what keeps a network from becoming a compact one.
    """

    def __init__(self, exchange: Exchange, modules: WatchedModules, averages: LiveGradientAverage | None) -> None:
        self.exchange, self.modules, self.averages = exchange, modules, averages
        self.choices: dict[str, Choice] = {}
        self.timings = Timings()
        self.notes: list[str] = []
        self._parts: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []  # of the model of the compact network
        self._alone: dict[WatchedLayer, Choice] = {}
        self._graph: tuple[Any, Graph | None] = (None, None)

    def _agree(self, seconds: list[float]) -> list[float]:
        """What the first rank has measured, on all of them: they must go the same way."""
        return seconds if self.averages is None or not seconds else self.averages.first(seconds)

    def _everywhere(self, *flags: bool, alike: bool = False) -> bool:
        """Whether they all hold, or are `alike`, on all ranks."""
        same = self.averages is None or self.averages.alike(list(flags))
        return same and (alike or all(flags))

    # ---- sparse layers

    def layers(self, candidates: list[Candidate], where: Mapping[nn.Parameter, Part]) -> set[WatchedLayer]:
        """Time each layer by itself; those that may gain from their live weights, if their neighbours do."""
        seconds: dict[WatchedLayer, tuple[float, float]] = {}
        for _, _, p, reg in candidates:
            for layer in self.modules.of(p):
                # Rows and filters make a smaller dense network.
                if (
                    layer.seen is not None
                    and not hooked(p)
                    and (reg.elementwise or (where[p].in_a_row and not reg.outputs))
                ):
                    with torch.enable_grad():
                        seconds[layer] = self.timings.layer(layer.module, layer.form, p, where[p], layer.seen)
        times = iter(
            self._agree([t for layer in self.modules.layers for t in seconds.get(layer, (math.nan, math.nan))])
        )
        self._alone = {
            layer: choosing.faster(where[layer.weight].density, *pair)
            for layer, *pair in zip(self.modules.layers, times, times, strict=True)
            if not math.isnan(pair[0])
        }
        self.choices.clear()
        self.notes.clear()
        self.choices.update((layer.name, replace(choice, kind="dense")) for layer, choice in self._alone.items())
        return {layer for layer, choice in self._alone.items() if choice.sparse < choosing.ABLE * choice.dense}

    def together(self, able: set[WatchedLayer]) -> set[WatchedLayer]:
        """The layers that compute with their live weights: each where it is faster, but only if the network is, too.

        A sparse layer also gains or loses by the layout of activations that it and its neighbours like. So the whole
        network is tried: dense, with those that are faster by themselves, and with all that are `able`.
        """
        network = self.modules.network
        alone = {layer for layer in able if self._alone[layer].kind == "sparse"}
        options = [alone, able] if alone != able else [alone]
        lives = {part.live.full: part.live for part in self.exchange.parts}
        best = alone
        if network is not None and network.inputs and able:
            optimizer, model = self.exchange.optimizer, self.modules.model
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            parameters = list({*trained, *model.parameters()})
            shown = [lives[layer.weight].pattern for layer in able]
            density = sum(where.size for where in shown) / max(1, sum(where.full_shape.numel() for where in shown))
            times = []
            for option in ([], *options):
                self.modules.compute_with({layer: lives[layer.weight] for layer in option})
                key = "+".join(sorted(layer.name for layer in option)) or "dense"
                times.append(self.timings.passes(key, model, network.inputs, parameters, density))
            times = self._agree(times)
            if not any(map(math.isnan, times)):
                i = min(range(len(options)), key=lambda i: times[i + 1])
                best = options[i] if times[i + 1] < choosing.FASTER * times[0] else set()
                kind = "sparse" if best else "dense"
                self.choices["(network)"] = Choice(kind, density, times[0], times[i + 1])
        self.modules.compute_with({layer: lives[layer.weight] for layer in best})
        self.modules.let_wait([part.live for part in self.exchange.parts])
        for layer in best:
            self.choices[layer.name] = replace(self._alone[layer], kind="sparse")
        return best

    # ---- the compact network

    def compact(self) -> bool:
        """Train a smaller dense network in place of the model, if dead units make one and it is faster."""
        network, model = self.modules.network, self.modules.model
        with self.modules.released():
            compact = self._made()
            if compact is None or network is None or network.inputs is None:
                return False
            size = sum(p.numel() for p in model.parameters())
            share = sum(p.numel() for p in compact.model.parameters()) / max(1, size)
            dense = self.timings.forward("dense", model, network.inputs)
            small = self.timings.forward("compact", compact.model, network.inputs, share)
            dense, small = self._agree([dense, small])
        new, places = self._new(compact), self.exchange.places()
        faster = bool(compact.lives) and small < choosing.FASTER * dense and all(live.full in places for live in new)
        kept = [name for name, p in model.named_parameters() if hooked(p) and compact.restricts(p)]
        if kept:
            self.notes.append(f"No smaller network: gradient hooks see the gradients of all of {', '.join(kept)}.")
        faster = self._everywhere(not kept) and faster
        self.choices["(network)"] = Choice("compact" if faster else "dense", share, dense, small)
        if not faster:
            for live in new:
                live.finish()
            return False
        self._use(compact)
        return True

    def outdated(self) -> bool:
        """Whether the compact network is of a model that has other modules, hooks or frozen parameters now."""
        network = self.modules.network
        if network is None or network.compact is None:
            return False
        hooks = any(hooked(live.full) for live in network.compact.lives)
        changed = any(tuple(members.values()) != before for members, before in self._parts)
        return hooks or changed or not network.compact.up_to_date()

    def expected(self) -> None:
        """Make the compact network that a loaded run had."""
        with self.modules.released():
            compact = self._made()
        if compact is not None:
            self._use(compact)

    def _made(self) -> CompactNetwork | None:
        """The compact network for the live rows now; None where there is none."""
        network, model, parts = self.modules.network, self.modules.model, self.exchange.parts
        if network is None or not network.inputs:
            return None
        rows = {part.live.full: part.live for part in parts if part.live.where.keeps == (0,) and part.live.where.spans}
        names = {n: m.weight for n, m in model.named_modules() if getattr(m, "weight", None) in rows}
        weights = set(names.values())
        given = [part.live for part in parts if part.live.full in weights or part.regularizer is None]
        graph = self._traced(network.inputs)
        if graph is None:
            return None
        alive = {}
        for name, weight in names.items():
            alive[name] = torch.zeros(len(weight), dtype=torch.bool)
            alive[name][rows[weight].where.index.cpu()] = True
        try:
            return CompactNetwork(graph, graph.cut(alive), given)
        except ValueError:  # a module whose rows are no outputs
            return None

    def _new(self, compact: CompactNetwork) -> list[Live]:
        """The live parts that the optimizer does not hold yet."""
        return [live for live in compact.lives if not any(live is part.live for part in self.exchange.parts)]

    def _use(self, compact: CompactNetwork) -> None:
        places = self.exchange.places()
        for live in self._new(compact):
            self.exchange.enter(*places[live.full], live)
        self._parts = parts(self.modules.model)
        if self.modules.network is not None:
            self.modules.network.compact, self.modules.network.expected = compact, False

    def _traced(self, inputs: tuple[Tensor, ...]) -> Graph | None:
        """The graph of the model for inputs of this shape; None where it cannot be followed."""
        model = self.modules.model
        looked, modules = looked_at(model), list(model.modules())
        key = [(x.shape[1:], x.dtype, x.device) for x in inputs], looked, modules
        if not self._everywhere(*(name in looked for name, _ in model.named_modules()), alike=True):
            return None
        # A hook there may do anything to what passes, and only calling it would tell.
        within = [name for name in looked if next(model.get_submodule(name).children(), None) is not None]
        if within:
            self.notes.append(f"No smaller network: {', '.join(within)} has modules in it, and a hook.")
            return None
        if self._graph[0] != key:
            self._graph = key, None
            with suppress(Untraceable), silent(model):
                self._graph = key, Graph(model, tuple(x[:2] if x.dim() else x for x in inputs))
        return self._graph[1]
