"""Multilevel training: most steps see the live weights only."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import is_sharded
from .network.graph import Graph, Untraceable
from .optim import AdaBreg, BregmanOptimizer
from .optim.base import primal
from .optim.options import check_number
from .part import Part, beyond
from .regularizers import Regularizer
from .restriction import choice as choosing
from .restriction.choice import Choice, Timings
from .restriction.layers import Layer, Live, Seen, Watch, chains, form_of
from .restriction.missed import make_up
from .restriction.narrow import Narrow, Whole
from .restriction.ranks import Ranks

MARGIN = 1.0
LOOK_EVERY = 100  # steps between looks whether restricting has become faster
WHOLE = ("step", "lam", "delta", "written", "waiting")  # what of the optimizer's state is not shaped like the weight


@dataclass
class Exchanged:
    """A weight of the optimizer while it is restricted.

    Attributes:
        group, place: where it stands in the optimizer's `param_groups`.
        regularizer: of the full space.
        held: the state of the full space, in which only the entries off the support are up to date.
        small: the state of the live part.
    """

    group: int
    place: int
    live: Live
    regularizer: Regularizer | None
    held: dict[str, Any]
    small: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Per layer, and for the whole network, what was chosen and the seconds of a training pass both ways."""

    choices: dict[str, Choice]

    def rows(self) -> list[dict[str, Any]]:
        """As plain values: layer, computes, density, dense_ms, sparse_ms."""
        return [
            {
                "layer": name, "computes": choice.kind, "density": choice.density,
                "dense_ms": 1e3 * choice.dense, "sparse_ms": 1e3 * choice.sparse,
            }
            for name, choice in self.choices.items()
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [["layer", "computes", "density", "dense ms", "sparse ms", "faster"]]
        for name, choice in self.choices.items():
            times = [f"{1e3 * choice.dense:.3f}", f"{1e3 * choice.sparse:.3f}", f"{choice.dense / choice.sparse:.1f} x"]
            lines.append([name, choice.kind, f"{choice.density:.3%}", *times])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


class Multilevel:
    r"""Alternates fine steps, which see the gradient of every weight, and coarse ones on the support alone [ML].

    .. code-block:: python

        levels = tb.Multilevel(model, optimizer)
        ...
        optimizer.step()
        levels.step()

    .. code-block:: text

        fine steps    the optimizer as it is: v ← v − τ g, θ ← prox_{δJ}(δv)
        then          S = {θ ≠ 0}, a union of groups; R takes the entries on S
        coarse steps  R θ, R v and R m move as the optimizer moves them, with the gradient R ∇L; off S nothing changes

    coarse_steps=99, fine_steps=1, boost=1.0 is the published algorithm; coarse_steps=0 is the optimizer alone.

    In a coarse phase the parameters of the optimizer are the live parts, so that its state, its time and the gradients
    shrink with the density, and a layer that is faster so computes with them alone. The weights of the model hold the
    live values and zeros at all times, and `state_dict()` of model and optimizer are those of the full network.
    Gradients of restricted weights are found at the parameters of the optimizer: clip those, not `model.parameters()`.
    λ waits for the next fine step, also that of `TargetDensity`.

    Under `DistributedDataParallel` pass the DDP module. Fine steps are DDP's own. In a coarse phase the ranks average
    the gradients of the live values, of biases and of all else that is trained at the end of backward, and nothing of
    the size of a restricted weight is sent; `no_sync()` holds there too, communication hooks and `join()` do not. The
    first rank's timings decide for all. All ranks must call `step()`, `leave()` and `load_state_dict()`.

    Args:
        model: the network, or the DistributedDataParallel around it.
        optimizer: LinBreg or AdaBreg on its parameters. Weights with `L1`, `NonNegativeL1` or named groups are
            restricted; those with a tensor for λ, with another regulariser or with none are trained as ever.
        coarse_steps, fine_steps: lengths of the phases. With `coarse_steps=None` the network is only restricted where
            that was measured to be faster, and the phases grow while a `TargetDensity` that knows `total_steps` goes
            there: from 4 coarse steps to 19 for one fine step, without it 9.
        margin: for each live weight, v of so many others moves in the coarse phases too, those nearest to the
            threshold; θ stays zero there until a fine step. None: 1 where `coarse_steps` is None, else 0. For `L1`.
        boost: factor on the steps of v off the support, in the fine steps. None: 1; but with `coarse_steps=None` and
            AdaBreg, the first fine step also makes up for the coarse ones, as far as the moments say that gradients
            agree (`restriction.missed.make_up`).

    Raises:
        ValueError: an option out of range, an optimizer without a dual, or one that has a `Multilevel` already;
            DTensors (`fully_shard`, tensor parallel); in the first forward pass, a `model` that runs inside a
            DistributedDataParallel, which was not passed.

    [ML] Lunk, Scott, Bungert, Sparse Training of Neural Networks based on Multilevel Mirror Descent, arXiv 2602.03535.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: BregmanOptimizer,
        coarse_steps: int | None = None,
        fine_steps: int | None = None,
        boost: float | None = None,
        *,
        margin: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"Invalid `model`: {type(model).__name__}; expected a torch.nn.Module.")
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                "Invalid `model`: its weights are divided among the ranks (DTensor); expected whole weights, "
                "in DistributedDataParallel or in one process."
            )
        if not isinstance(optimizer, BregmanOptimizer) or not optimizer.has_dual:
            raise ValueError(f"Invalid `optimizer`: {type(optimizer).__name__}; expected LinBreg or AdaBreg.")
        if optimizer.levels is not None:
            raise ValueError("`optimizer` belongs to another Multilevel already.")
        for name, value, low in (("coarse_steps", coarse_steps, 0), ("fine_steps", fine_steps, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"Invalid `{name}`: {value!r}; expected a whole number of at least {low}, or None.")
        if boost is not None:
            check_number("boost", boost, strict=True)
        if margin is not None:
            check_number("margin", margin)
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = optimizer
        self.coarse_steps, self.fine_steps = coarse_steps, 1 if fine_steps is None else fine_steps
        self.boost = 1.0 if boost is None else float(boost)
        self._makes_up = boost is None and coarse_steps is None and isinstance(optimizer, AdaBreg)
        self._missed: tuple[int, list[Exchanged]] = (
            0,
            [],
        )  # coarse steps of the phase that has just ended, and its parts
        self._phase = 0  # coarse steps of this phase so far
        self.margin = (MARGIN if coarse_steps is None else 0.0) if margin is None else float(margin)
        self._reach = 0.8  # entries with |v| beyond this share of λ are near
        self.left = self.fine_steps  # steps until the phase changes
        #: steps so far: "fine" and "coarse"
        self.counts: Counter[str] = Counter(fine=0, coarse=0)
        #: floating-point operations of the Linear and Conv layers in the steps so far, and what dense steps would take:
        #: 3 · 2 · weights · positions for a dense layer, that times the density for a sparse one
        self.flops = self.dense_flops = 0.0
        #: how each layer computes in the coarse phase, and the timings behind it
        self.choices: dict[str, Choice] = {}
        self.timings = Timings()
        self._parts: list[Exchanged] = []
        self._last: list[dict[str, Any]] = []  # the parts of the phase that has just ended, while the layers use them
        self._layers: list[Layer] = []
        self._whole: Whole | None = None
        self._others: list[Watch] = []
        self._graph: tuple[Any, Graph | None] = (None, None)
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._ranks: Ranks | None = None
        if coarse_steps != 0:
            self._attach()
            if isinstance(model, DistributedDataParallel):
                self._ranks = Ranks(model, lambda: {part.live.full: part.live.values for part in self._parts})

    # ------------------------------------------------------------------ what a loop calls

    @property
    def restricted(self) -> bool:
        """Whether the optimizer holds the live parts: the coarse phase."""
        return bool(self._parts)

    @property
    def sparse(self) -> bool:
        """Whether a layer computes with its live weights alone, now or in the step to come."""
        return any(layer.live is not None for layer in self._layers)

    def step(self) -> None:
        """Count a step, and go on to the next phase if it is time to. Call it after every `optimizer.step()`."""
        self.counts["coarse" if self.restricted else "fine"] += 1
        if self.coarse_steps == 0:
            return
        self._phase += self.restricted
        self._add_up()
        self.left -= 1
        if self.left > 0:
            return
        if self.restricted:
            self.leave(at_once=False)
            self.left = self.fine_steps
            return
        for control in self.optimizer.controls:
            control.catch_up()
        if self._restrict():
            self.left = self._coarse_steps()
        else:  # it would not be faster: go on as ever, with nothing in between, and look again
            self.left = LOOK_EVERY
            self._watch(False)

    @torch.no_grad()
    def leave(self, *, at_once: bool = True) -> None:
        """End the coarse phase: the optimizer holds the weights themselves, with the state of the full space.

        With `at_once=False` the layers go on computing with the live weights until the next step is done, as long as
        their weights are not touched; the gradient is that of all weights.
        """
        if at_once or self._parts:
            self._last = [] if at_once else [self._describe(part) for part in self._parts]
            self._missed = (0, []) if at_once or not self._makes_up else (self._phase, list(self._parts))
            for part in self._parts:
                part.live.finish()
                self._hold_back(part)
                self._show(part, full=True)
            if self._whole is not None:
                self._whole.catch_up()
                self._whole.narrow, self._whole.expected = None, False
            if at_once:
                for layer in self._layers:
                    layer.live = None
            self._parts = []
            self.optimizer.forget()

    def state_dict(self) -> dict[str, Any]:
        """The place in the cycle, the support of a coarse phase, and what was measured."""
        return {
            "left": self.left,
            "reach": self._reach,
            "phase": self._phase,
            "counts": dict(self.counts),
            "flops": [self.flops, self.dense_flops],
            "restricted": self.restricted,
            "compact": self._whole is not None and (self._whole.expected or self._whole.narrow is not None),
            "parts": [self._describe(part) for part in self._parts] or list(self._last),
            "seen": {
                layer.name: [list(layer.seen.shape), list(layer.seen.stride), layer.seen.needs_grad]
                for layer in self._layers
                if layer.seen is not None
            },
            "seconds": dict(self.timings.seconds),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Load the model and the optimizer before.

        Raises ValueError where the optimizer's weights are others.
        """
        self.leave()
        self._watch(True)
        self.left, self.counts = state_dict["left"], Counter(state_dict["counts"])
        self._reach, self._phase = state_dict["reach"], state_dict.get("phase", 0)
        self.flops, self.dense_flops = state_dict["flops"]
        self.timings.seconds = dict(state_dict["seconds"])
        for layer in self._layers:
            seen = state_dict["seen"].get(layer.name)
            layer.seen = Seen(tuple(seen[0]), tuple(seen[1]), bool(seen[2])) if seen else None
        for saved in state_dict["parts"]:
            i, place = saved["group"], saved["place"]
            try:
                full = self.optimizer.param_groups[i]["params"][place]
            except IndexError:
                raise ValueError(f"`state_dict` has a weight {place} in group {i}; the optimizer has none.") from None
            if list(full.shape) != saved["shape"]:
                raise ValueError(f"`state_dict` has a weight of shape {saved['shape']}; here it is {list(full.shape)}.")
            layers = [layer for layer in self._layers_of(full) if layer.name in saved["sparse"]]
            reg = self._regularizer(i)
            near = Part(full, (), saved["near"]) if "near" in saved else None
            live = self._live(full, part_of(full, reg, saved["index"]), near, layers)
            self._enter(i, place, live)
            if near is not None:  # those that have passed the threshold in this phase are no edit
                state = self.optimizer.state[live.values]
                weight = primal(state["dual"], reg, state["lam"], state["delta"])
                live.values[len(live.pattern) :] = weight[len(live.pattern) :]
            for layer in layers:
                layer.live = live
        self._let_wait()
        self.optimizer.forget()
        if self._whole is not None:
            self._whole.expected = state_dict["compact"]
        if not state_dict["restricted"]:
            self.leave(at_once=False)

    @property
    def report(self) -> Report:
        """How each layer computed in the last coarse phase, and the timings that decided it. Prints as a table."""
        return Report(dict(self.choices))

    def _add_up(self) -> None:
        """The operations of this step, by formula."""
        narrow = self._whole.narrow if self._whole is not None else None
        for layer in self._layers:
            work, share = 3 * layer.work, 1.0
            if layer.live is not None:
                share = layer.live.pattern.density
                if layer.live.near is not None and self.restricted:
                    share += layer.live.near.density / 3
                if not self.restricted:  # a fine step on the live weights, but for the gradient
                    share = (2 * share + 1) / 3 if layer.form.whole else 1.0
            elif narrow is not None:
                share = narrow.shares.get(layer.name, 1.0)
            self.flops += work * share
            self.dense_flops += work

    def _coarse_steps(self) -> int:
        """Length of the coarse phase that begins."""
        if self.coarse_steps is not None:
            return self.coarse_steps
        totals = [control.total_steps for control in self.optimizer.controls if control.total_steps is not None]
        return max(1, self.fine_steps * cycle(self.counts.total() / max(totals) if totals else None) - self.fine_steps)

    # ------------------------------------------------------------------ into the live part and back

    def _attach(self) -> None:
        """Watch the layers that have a sparse form, and the optimizer."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, module in self.model.named_modules():
            form = form_of(module)
            if form is not None and id(module.weight) in trained:
                self._layers.append(Layer(name, module, form, self._on_training, self._on_use))
        optimizer = self.optimizer
        pools, sequentials = chains(self.model, self._layers)
        root = next((chain for chain in sequentials if chain.module is self.model), None)
        self._others = [*pools, *(chain for chain in sequentials if chain is not root)]
        if not any(layer.module is self.model for layer in self._layers) and len(list(self.model.modules())) > 1:
            self._whole = Whole(self.model, self._on_call, root)
        self._watch(True)
        optimizer.levels = self
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        optimizer.register_state_dict_pre_hook(lambda _: self._show_all(full=True))
        optimizer.register_state_dict_post_hook(lambda *_: self._show_all(full=False), prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda *_: self.leave())

    def _watch(self, on: bool) -> None:
        """Stand between the modules and their calls, or not."""
        watches: list[Watch] = [*self._layers, *self._others, *([] if self._whole is None else [self._whole])]
        for watch in watches:
            watch.watch() if on else watch.release()

    def _layers_of(self, weight: Tensor) -> list[Layer]:
        return [layer for layer in self._layers if layer.weight is weight]

    def _candidates(self) -> list[tuple[int, int, nn.Parameter, Regularizer]]:
        """(group, place, weight, regulariser) of what can be restricted."""
        found = []
        for i, (group, reg) in enumerate(zip(self.optimizer.param_groups, self.optimizer.regularizers, strict=True)):
            single = all(not isinstance(group[name], Tensor) or group[name].numel() == 1 for name in ("lam", "delta"))
            ready = [p for p in group["params"] if p.requires_grad and "dual" in self.optimizer.state.get(p, {})]
            # In a group of weights all have one regulariser, and that of live groups is another one.
            if reg is None or not single or not (reg.elementwise or len(ready) == len(group["params"])):
                continue
            found += [
                (i, place, p, reg)
                for place, p in enumerate(group["params"])
                if any(p is q for q in ready) and reg.spans(p.shape) is not None
            ]
        return found

    @torch.no_grad()
    def _restrict(self) -> bool:
        """Choose how each layer will compute, and go to the live parts; False, and nothing done, if none gains."""
        self._phase, self._missed = 0, (0, [])
        candidates = self._candidates()
        rows = any(reg.outputs for *_, reg in candidates)
        where, near = self._supports(candidates)
        seconds: dict[Layer, tuple[float, float]] = {}
        chosen: dict[Layer, Choice] = {}
        for _, _, p, reg in candidates:
            for layer in self._layers_of(p):
                # Rows and filters make a smaller dense network.
                if layer.seen is not None and (reg.elementwise or (where[p].in_a_row and not reg.outputs)):
                    with torch.enable_grad():
                        seconds[layer] = self.timings.layer(layer.module, layer.form, p, where[p], layer.seen)
        times = iter(self._agree([t for layer in self._layers for t in seconds.get(layer, (math.nan, math.nan))]))
        for layer, *pair in zip(self._layers, times, times, strict=True):
            if not math.isnan(pair[0]):
                chosen[layer] = choosing.faster(where[layer.weight].density, *pair)
        able = {layer for layer, choice in chosen.items() if choice.sparse < choosing.ABLE * choice.dense}
        self.choices = {layer.name: replace(choice, kind="dense") for layer, choice in chosen.items()}
        if not candidates or (self.coarse_steps is None and not able and not rows):
            return False
        self._watch(True)
        for i, place, p, _ in candidates:
            layers = [layer for layer in self._layers_of(p) if layer in able]
            self._enter(i, place, self._live(p, where[p], near.get(p), layers))
        self.optimizer.forget()
        sparse = self._choose(chosen, able)
        for layer in sparse:
            self.choices[layer.name] = replace(chosen[layer], kind="sparse")
        compact = rows and self._compact(measure=True)
        if self.coarse_steps is None and not sparse and not compact:
            self.leave()
            return False
        return True

    def _choose(self, chosen: dict[Layer, Choice], able: set[Layer]) -> set[Layer]:
        """The layers that compute with their live weights: each where it is faster, but only if the network is, too.

        A sparse layer also gains or loses by the layout of activations that it and its neighbours like. So the whole
        network is tried: dense, with those that are faster by themselves, and with all that are `able`.
        """
        alone = {layer for layer in able if chosen[layer].kind == "sparse"}
        whole, options = self._whole, [alone, able] if alone != able else [alone]
        lives = {part.live.full: part.live for part in self._parts}
        if whole is None or not whole.inputs or not able:
            best = alone
        else:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            parameters = list({*trained, *self.model.parameters()})
            shown = [lives[layer.weight].pattern for layer in able]
            density = sum(where.size for where in shown) / max(1, sum(where.full_shape.numel() for where in shown))
            times = []
            for option in ([], *options):
                for layer in self._layers:
                    layer.live = lives[layer.weight] if layer in option else None
                key = "+".join(sorted(layer.name for layer in option)) or "dense"
                times.append(self.timings.passes(key, self.model, whole.inputs, parameters, density))
            times = self._agree(times)
            i = min(range(len(options)), key=lambda i: times[i + 1])
            best = options[i] if times[i + 1] < choosing.MARGIN * times[0] else set()
            kind = "sparse" if best else "dense"
            self.choices["(network)"] = Choice(kind, density, times[0], times[i + 1])
        for layer in self._layers:
            layer.live = lives[layer.weight] if layer in best else None
        self._let_wait()
        return best

    def _agree(self, seconds: list[float]) -> list[float]:
        """What the first rank has measured, on all of them: they must go the same way."""
        return self._ranks.first(seconds) if self._ranks is not None and seconds else seconds

    def _let_wait(self) -> None:
        """Weights that no layer reads are written when somebody looks at them."""
        for part in self._parts:
            layers = self._layers_of(part.live.full)
            if layers and all(layer.live is part.live for layer in layers):
                part.live.wait()

    def _compact(self, *, measure: bool) -> bool:
        """Train a smaller dense network in place of the model, if dead units make one and it is faster."""
        whole = self._whole
        if whole is None or whole.inputs is None or not whole.inputs:
            return False
        rows = {
            part.live.full: part.live for part in self._parts if part.live.where.keeps == (0,) and part.live.where.spans
        }
        names = {n: m.weight for n, m in self.model.named_modules() if getattr(m, "weight", None) in rows}
        weights = set(names.values())
        given = [part.live for part in self._parts if part.live.full in weights or part.regularizer is None]
        self._watch(False)
        try:
            graph = self._traced(whole.inputs)
            if graph is None:
                return False
            alive = {}
            for name, weight in names.items():
                alive[name] = torch.zeros(len(weight), dtype=torch.bool)
                alive[name][rows[weight].where.index.cpu()] = True
            try:
                narrow = Narrow(graph, graph.cut(alive), given)
            except ValueError:  # a module that is no Linear or Conv
                return False
            if measure:
                share = sum(p.numel() for p in narrow.model.parameters()) / max(
                    1, sum(p.numel() for p in self.model.parameters())
                )
                dense = self.timings.forward("dense", self.model, whole.inputs)
                small = self.timings.forward("compact", narrow.model, whole.inputs, share)
                dense, small = self._agree([dense, small])
        finally:
            self._watch(True)
        places = {
            p: (i, place)
            for i, group in enumerate(self.optimizer.param_groups)
            for place, p in enumerate(group["params"])
            if "dual" in self.optimizer.state.get(p, {})
        }
        new = [live for live in narrow.lives if not any(live is part.live for part in self._parts)]
        if measure:
            faster = bool(narrow.lives) and small < choosing.MARGIN * dense and all(live.full in places for live in new)
            self.choices["(network)"] = Choice("compact" if faster else "dense", share, dense, small)
            if not faster:
                for live in new:
                    live.finish()
                return False
        for live in new:
            self._enter(*places[live.full], live)
        whole.narrow, whole.expected = narrow, False
        return True

    def _traced(self, inputs: tuple[Tensor, ...]) -> Graph | None:
        """The graph of the model for inputs of this shape; None where it cannot be followed."""
        key = [(x.shape[1:], x.dtype, x.device) for x in inputs]
        if self._graph[0] != key:
            try:
                self._graph = key, Graph(self.model, tuple(x[:2] if x.dim() else x for x in inputs))
            except Untraceable:
                self._graph = key, None
        return self._graph[1]

    def _on_call(self) -> None:
        """Before the compact network is used."""
        self._on_edit()
        if self._whole is not None and self._whole.expected and self._parts:
            with torch.no_grad():
                self._compact(measure=False)

    def _supports(
        self, candidates: list[tuple[int, int, nn.Parameter, Regularizer]]
    ) -> tuple[dict[nn.Parameter, Part], dict[nn.Parameter, Part]]:
        """The support of each weight, and the entries near the threshold that are trained along."""
        optimizer = self.optimizer
        where: dict[nn.Parameter, Part] = {}
        near: dict[nn.Parameter, Part] = {}
        live = 0
        for i, _, p, reg in candidates:
            # The λ that θ was written with, if it has risen since: what is alive must not be left behind.
            lam = min(float(optimizer.param_groups[i]["lam"]), float(optimizer.state[p]["lam"]))
            if not self.margin or not reg.by_magnitude or lam <= 0:
                where[p] = part_of(p, reg)
                continue
            index = beyond(optimizer.state[p]["dual"], self._reach * lam)
            alive = Part(p, (), index).restrict(p) != 0
            where[p], near[p] = Part(p, (), index[alive]), Part(p, (), index[~alive])
            live += len(where[p])
        found = sum(map(len, near.values()))
        if near:  # about as many lie between the bound and λ as their distance says
            ratio = min(2.0, max(0.5, self.margin * max(live, 1) / max(found, 1)))
            self._reach = min(0.98, max(0.1, 1 - (1 - self._reach) * ratio))
        return where, near

    def _live(self, full: nn.Parameter, where: Part, near: Part | None, layers: list[Layer]) -> Live:
        """The live part of a weight, for the layers that may compute with it alone."""
        if not layers:
            return Live(full, where, near)
        pattern = layers[0].form.pattern
        if where.spans:  # whole kernels
            return Live(full, where, None, pattern(full, where.entries))
        return Live(full, pattern(full, where.index), pattern(full, near.index) if near is not None else None)

    def _regularizer(self, group: int) -> Regularizer | None:
        """Of the full space."""
        known = [part.regularizer for part in self._parts if part.group == group]
        return known[0] if known else self.optimizer.regularizers[group]

    def _enter(self, group: int, place: int, live: Live) -> None:
        """Put the live part of a weight in its place, with its state."""
        optimizer = self.optimizer
        reg = self._regularizer(group)
        full, where = live.full, live.where
        held = optimizer.state[full]
        small = {
            name: where.restrict(value) if name not in WHOLE and isinstance(value, Tensor) else value
            for name, value in held.items()
        }
        if full.grad is not None:  # of the last step; whoever does not reset gradients adds the next ones to it
            live.values.grad, full.grad = where.restrict(full.grad), None
        part = Exchanged(group, place, live, reg, held, small)
        self._parts.append(part)
        self._show(part, full=False)
        if self._ranks is not None:
            self._ranks.watch(live.values)

    def _hold_back(self, part: Exchanged) -> None:
        """Entries near the threshold that have passed it wait there: the next fine step brings them to life."""
        if part.live.near is not None:
            state = self.optimizer.state[part.live.values]
            lam = (1 - 4 * torch.finfo(state["dual"].dtype).eps) * float(state["lam"])
            state["dual"][len(part.live.pattern) :].clamp_(-lam, lam)

    def _show(self, part: Exchanged, *, full: bool) -> None:
        """Let the optimizer hold the weight itself, with its state brought up to date, or its live part."""
        optimizer, live = self.optimizer, part.live
        here, there = (live.full, live.values) if full else (live.values, live.full)
        if full:
            part.small = optimizer.state[live.values]
            for name, value in part.small.items():
                if name not in WHOLE and isinstance(value, Tensor):
                    if name not in part.held:  # a buffer that the coarse steps began
                        part.held[name] = torch.zeros_like(live.full, dtype=value.dtype)
                    live.where.prolong(value, part.held[name])
                else:
                    part.held[name] = value
        optimizer.state.pop(there, None)
        optimizer.state[here] = part.held if full else part.small
        optimizer.param_groups[part.group]["params"][part.place] = here
        optimizer.regularizers[part.group] = part.regularizer if full else _on_live(part.regularizer)

    @torch.no_grad()
    def _show_all(self, *, full: bool) -> None:
        for part in self._parts:
            self._show(part, full=full)

    def _describe(self, part: Exchanged) -> dict[str, Any]:
        live = part.live
        return {
            "group": part.group,
            "place": part.place,
            "shape": list(live.full.shape),
            "index": live.pattern.index,
            **({} if live.near is None else {"near": live.near.index}),
            "sparse": [layer.name for layer in self._layers if layer.live is live],
        }

    @torch.no_grad()
    def _before_step(self) -> None:
        self._on_edit()
        missed, parts = self._missed
        for part in parts:
            state, full = self.optimizer.state[part.live.full], part.live.full
            if part.regularizer is not None and full.grad is not None and "exp_avg" in state:
                group = self.optimizer.param_groups[part.group]
                make_up(full, state, group, part.regularizer, part.live.where, missed)
        self._missed = (0, [])
        self._before = []
        if self.boost != 1 and not self.restricted:
            for _, _, p, reg in self._candidates():
                if p.grad is not None:
                    dual = self.optimizer.state[p]["dual"]
                    self._before.append((p, dual.clone(), reg.coupled(p != 0)))

    @torch.no_grad()
    def _after_step(self) -> None:
        """Write the live values to the weights of the model; after a fine step, boost v off the support."""
        for part in self._parts:
            part.live.write()
        if self._whole is not None:
            self._whole.catch_up()
        if self._last and not self._parts:
            self._last = []
            for layer in self._layers:
                layer.live = None
        for p, before, mask in self._before:
            dual = self.optimizer.state[p]["dual"]
            dual.copy_(torch.where(mask, dual, before + self.boost * (dual - before)))
            self.optimizer.write(p)
        self._before = []

    def _on_training(self) -> None:
        """A layer is called in training."""
        if self._ranks is None and DistributedDataParallel._active_ddp_module is not None:
            raise ValueError(
                "Invalid `model`: it runs inside a DistributedDataParallel; expected that, as in "
                "tb.Multilevel(ddp, optimizer)."
            )

    def _on_use(self) -> None:
        """A layer is about to use a weight that was changed from outside.

        Ranks may evaluate alone, so they do not leave the phase then; the layer computes with the weight as it is.
        """
        if self._ranks is None or torch.is_grad_enabled():
            self._on_edit()

    @torch.no_grad()
    def _on_edit(self) -> None:
        """Weights that were changed from outside: their live parts follow; if others have come alive, all is left."""
        if not self._parts:
            if any(layer.live is not None and layer.live.edited() for layer in self._layers):
                self.leave()
            return
        edited = [part.live for part in self._parts if part.live.edited()]
        for live in edited:
            if torch.count_nonzero(live.full) != torch.count_nonzero(live.where.restrict(live.full)):
                for part in self._parts:
                    grad = part.live.values.grad
                    if grad is not None:
                        part.live.full.grad = torch.zeros_like(part.live.full)
                        part.live.where.prolong(grad, part.live.full.grad)
                self.leave()
                self.left = 1
                return
        for live in edited:
            live.read()


def part_of(weight: Tensor, regularizer: Regularizer | None, index: Tensor | None = None) -> Part:
    """The live part of a weight, in the units of its regulariser; in single entries without one."""
    spans = () if regularizer is None else regularizer.spans(weight.shape)
    return Part(weight, spans or (), index)


def _on_live(regularizer: Regularizer | None) -> Regularizer | None:
    """J on the live parts."""
    return None if regularizer is None else regularizer.restricted()


def cycle(progress: float | None) -> int:
    """The length of a cycle of one fine step and coarse ones: 5 · 4^progress, or 10 where the end is not known.

    The support is found in the beginning, so the gradient off it is worth more there; from 5 to 20 makes 10.8 % fine
    steps (docs/multilevel.md).
    """
    return 10 if progress is None else round(5 * 4 ** min(progress, 1.0))
