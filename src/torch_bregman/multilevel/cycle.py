"""Multilevel training: most steps see the live weights only."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import kernels
from ..distributed import is_sharded
from ..optim import AdaBreg, BregmanOptimizer
from ..optim.options import check_number
from ..optim.unwrapped import unwrapped
from ..warned import warn
from .averages import LiveGradientAverage
from .contest import Contest
from .exchange import Exchange
from .layers import SeenInput, live_part
from .limits import NO_NUMBA, meant, sentences
from .modules import WatchedModules
from .off_support import OffSupport
from .report import Report
from .supports import Supports, candidates

DEFAULT_MARGIN = 1.0
LOOK_EVERY = 100  # steps between looks whether restricting has become faster


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
    `grad` of a restricted weight shows the gradient of its live part, zeros elsewhere: clear, clip and change gradients
    at `model.parameters()` or at the parameters of the optimizer, as you like.
    λ waits for the next fine step, also that of `TargetDensity`, whose `step()` may be called before or after this one.

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
            agree (`off_support.take_missed_steps`).

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
        optimizer = unwrapped(optimizer)
        _check(model, optimizer, coarse_steps, fine_steps, boost, margin)
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = optimizer
        self.coarse_steps, self.fine_steps = coarse_steps, 1 if fine_steps is None else fine_steps
        self.boost = 1.0 if boost is None else float(boost)
        self.margin = (DEFAULT_MARGIN if coarse_steps is None else 0.0) if margin is None else float(margin)
        self.left = self.fine_steps  # steps until the phase changes
        self._phase = 0  # coarse steps of this phase so far
        self._waiting = False  # a step is to be counted, once all controls have
        #: steps so far: "fine" and "coarse"
        self.counts: Counter[str] = Counter(fine=0, coarse=0)
        #: floating-point operations of the Linear and Conv layers in the steps so far, and what dense steps would take:
        #: 3 · 2 · weights · positions for a dense layer, that times the density for a sparse one
        self.flops = self.dense_flops = 0.0
        self._exchange = Exchange(optimizer)
        trained = [p for group in optimizer.param_groups for p in group["params"]] if coarse_steps != 0 else []
        self._modules = WatchedModules(self.model, trained, self._on_training, self._on_use, self._on_compact)
        self._supports = Supports(optimizer)
        catches_up = boost is None and coarse_steps is None and isinstance(optimizer, AdaBreg)
        self._off_support = OffSupport(optimizer, catches_up=catches_up)
        self._averages: LiveGradientAverage | None = None
        if coarse_steps != 0 and isinstance(model, DistributedDataParallel):
            self._averages = LiveGradientAverage(model, self._exchange, self._count_at_last)
        self._contest = Contest(self._exchange, self._modules, self._averages)
        #: how each layer computes in the coarse phase, and the timings behind it
        self.choices, self.timings = self._contest.choices, self._contest.timings
        self._meant = meant(self._modules.layers, optimizer)
        if not kernels.available() and NO_NUMBA in sentences(self._meant):
            warn(NO_NUMBA)
        self._last: list[dict[str, Any]] = []  # the parts of the phase that has just ended, while the layers use them
        if coarse_steps != 0:
            self._attach()

    def _attach(self) -> None:
        """Work with the optimizer from now on."""
        optimizer, exchange = self.optimizer, self._exchange
        optimizer.levels = self
        for control in optimizer.controls:
            control.counted = False
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        optimizer.register_state_dict_pre_hook(lambda _: exchange.show(full=True))
        optimizer.register_state_dict_post_hook(lambda *_: exchange.show(full=False), prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda *_: self.leave())

    # ------------------------------------------------------------------ what a loop calls

    @property
    def restricted(self) -> bool:
        """Whether the optimizer holds the live parts: the coarse phase."""
        return bool(self._exchange.parts)

    @property
    def sparse(self) -> bool:
        """Whether a layer computes with its live weights alone, now or in the step to come."""
        return any(layer.live is not None for layer in self._modules.layers)

    def step(self) -> None:
        """Count a step, and go on to the next phase if it is time to. Call it after every `optimizer.step()`.

        Where a `TargetDensity` has not counted this step yet it comes first: then both happen in its `step()`.
        """
        self._waiting = True
        self.control_counted()

    def control_counted(self) -> None:
        """A control has counted a step: go on, if `step()` has waited for it and no other one is missing."""
        if self.coarse_steps == 0 or all(control.counted for control in self.optimizer.controls):
            self._count_at_last()

    def _count_at_last(self) -> None:
        """Count a step that waits; at the latest where the next one begins."""
        if not self._waiting:
            return
        self._waiting = False
        self.counts["coarse" if self.restricted else "fine"] += 1
        if self.coarse_steps == 0:
            return
        for control in self.optimizer.controls:
            control.counted = False
        self._phase += self.restricted
        for taken, dense in self._modules.operations(restricted=self.restricted):
            self.flops += taken
            self.dense_flops += dense
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
            self.left = coarse_length(self)
        else:  # it would not be faster: go on as ever, with nothing in between, and look again
            self.left = LOOK_EVERY
            self._modules.watch(False)

    @torch.no_grad()
    def leave(self, *, at_once: bool = True) -> None:
        """End the coarse phase: the optimizer holds the weights themselves, with the state of the full space.

        With `at_once=False` the layers go on computing with the live weights until the next step is done, as long as
        their weights are not touched; the gradient is that of all weights.
        """
        if not at_once and not self.restricted:
            return
        parts = self._exchange.parts
        self._last = [] if at_once else [part.describe(self._modules.layers) for part in parts]
        self._off_support.phase_ended(0 if at_once else self._phase, [] if at_once else parts)
        self._exchange.end(gradients=at_once)
        if self._modules.network is not None:
            self._modules.network.end()
        if at_once:
            self._modules.compute_with({})

    def state_dict(self) -> dict[str, Any]:
        """The place in the cycle, the support of a coarse phase, and what was measured."""
        network, layers = self._modules.network, self._modules.layers
        return {
            "left": self.left,
            "reach": self._supports.reach,
            "phase": self._phase,
            "counts": dict(self.counts),
            "flops": [self.flops, self.dense_flops],
            "restricted": self.restricted,
            "compact": network is not None and (network.expected or network.compact is not None),
            "parts": [part.describe(layers) for part in self._exchange.parts] or list(self._last),
            "seen": {
                layer.name: [list(layer.seen.shape), list(layer.seen.stride), layer.seen.needs_grad]
                for layer in layers
                if layer.seen is not None
            },
            "seconds": dict(self.timings.seconds),
            **({"waiting": True} if self._waiting else {}),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken. Load the model and the optimizer before.

        Raises ValueError where the optimizer's weights are others.
        """
        self.leave()
        self._modules.watch()
        self.left, self.counts = state_dict["left"], Counter(state_dict["counts"])
        self._supports.reach, self._phase = state_dict["reach"], state_dict.get("phase", 0)
        self._waiting = state_dict.get("waiting", False)
        self.flops, self.dense_flops = state_dict["flops"]
        self.timings.seconds = dict(state_dict["seconds"])
        for layer in self._modules.layers:
            seen = state_dict["seen"].get(layer.name)
            layer.seen = SeenInput(tuple(seen[0]), tuple(seen[1]), bool(seen[2])) if seen else None
        for saved in state_dict["parts"]:
            self._exchange.enter_saved(saved, self._modules.of)
        self._modules.let_wait([part.live for part in self._exchange.parts])
        self.optimizer.forget()
        if self._modules.network is not None:
            self._modules.network.expected = state_dict["compact"]
        if not state_dict["restricted"]:
            self.leave(at_once=False)

    @property
    def report(self) -> Report:
        """How each layer computed in the last coarse phase, and the timings that decided it. Prints as a table."""
        late = self._modules.late(self._exchange.weights()) if self.coarse_steps != 0 else []
        later = [f"Computed densely, as they came after Multilevel was made: {', '.join(late)}."] if late else []
        return Report(dict(self.choices), (*sentences(self._meant), *self._contest.notes, *later))

    # ------------------------------------------------------------------ the cycle

    @torch.no_grad()
    def _restrict(self) -> bool:
        """Choose how each layer will compute, and go to the live parts; False, and nothing done, if none gains."""
        self._phase = 0
        self._off_support.phase_ended(0, [])
        found = candidates(self.optimizer)
        outputs = any(candidate.regularizer.outputs for candidate in found)
        where, near = self._supports.find(found, self.margin)
        able = self._contest.layers(found, where)
        if not found or (self.coarse_steps is None and not able and not outputs):
            return False
        self._modules.watch()
        for i, place, p, _ in found:
            layers = [layer for layer in self._modules.of(p) if layer in able]
            self._exchange.enter(i, place, live_part(p, where[p], near.get(p), layers))
        self.optimizer.forget()
        sparse = self._contest.together(able)
        compact = outputs and self._contest.compact()
        if self.coarse_steps is None and not sparse and not compact:
            self.leave()
            return False
        return True

    # ------------------------------------------------------------------ what the optimizer and the modules call
    # That is why there are more methods here than a class should have: what they do is in the other files.

    @torch.no_grad()
    def _before_step(self) -> None:
        self._count_at_last()
        for control in self.optimizer.controls:
            control.counted = False
        self._on_edit()
        weights = [] if self.boost == 1 or self.restricted else candidates(self.optimizer)
        self._off_support.before_step(self.boost, [(found.weight, found.regularizer) for found in weights])

    @torch.no_grad()
    def _after_step(self) -> None:
        """Write the live values to the weights of the model; after a fine step, take v further off the support."""
        for part in self._exchange.parts:
            part.live.write()
        if self._modules.network is not None:
            self._modules.network.catch_up()
        if self._last and not self.restricted:
            self._last = []
            self._modules.compute_with({})
        self._off_support.after_step(self.boost)

    def _on_training(self) -> None:
        """A layer or the network is called in training."""
        if self._averages is None and DistributedDataParallel._active_ddp_module is not None:
            raise ValueError(
                "Invalid `model`: it runs inside a DistributedDataParallel; expected that, as in "
                "tb.Multilevel(ddp, optimizer)."
            )
        self._count_at_last()

    def _on_use(self) -> None:
        """A layer is about to use a weight that was changed from outside.

        Ranks may evaluate alone, so they do not leave the phase then; the layer computes with the weight as it is.
        """
        if self._averages is None or torch.is_grad_enabled():
            self._on_edit()

    def _on_compact(self) -> None:
        """The compact network is about to be used, or made."""
        self._on_edit()
        network = self._modules.network
        if network is None:
            return
        if self._contest.outdated():
            network.end()
        if network.expected and self.restricted:
            with torch.no_grad():
                self._contest.expected()

    @torch.no_grad()
    def _on_edit(self) -> None:
        """Weights that were changed from outside: their live parts follow; if others have come alive, all is left."""
        if not self.restricted:
            if any(layer.live is not None and layer.live.edited() for layer in self._modules.layers):
                self.leave()
        elif not self._exchange.follow_edits():
            self.leave()
            self.left = 1


def _check(
    model: Any, optimizer: Any, coarse_steps: int | None, fine_steps: int | None, boost: Any, margin: Any
) -> None:
    """ValueError where an argument of `Multilevel` cannot be used."""
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


def coarse_length(levels: Multilevel) -> int:
    """Steps of the coarse phase that begins."""
    if levels.coarse_steps is not None:
        return levels.coarse_steps
    totals = [control.total_steps for control in levels.optimizer.controls if control.total_steps is not None]
    length = levels.fine_steps * cycle(levels.counts.total() / max(totals) if totals else None)
    return max(1, length - levels.fine_steps)


def cycle(progress: float | None) -> int:
    """The length of a cycle of one fine step and coarse ones: 5 · 4^progress, or 10 where the end is not known.

    The support is found in the beginning, so the gradient off it is worth more there; from 5 to 20 makes 10.8 % fine
    steps (docs/multilevel.md).
    """
    return 10 if progress is None else round(5 * 4 ** min(progress, 1.0))
