"""The modules of a network that are watched: what computes with live weights, what stands beside it, and the whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .forms import form_of
from .layers import WatchedLayer
from .live import Live
from .network_watch import NetworkWatch
from .sequential import sequentials
from .watch import Watch


class WatchedModules:
    """Watches a network.

    Args:
        model: the network.
        trained: the parameters that the optimizer holds; with none, nothing is watched.
        on_training: called before every training call of a layer or the network.
        on_edit: called when a weight was changed from outside, before a layer uses it.
        on_compact: called before the compact network is used or made.

    Attributes:
        layers: those that have a sparse form and a weight that is trained.
        network: the network as a whole; None where it is a single layer.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Collection[Tensor],
        on_training: Callable[[], None],
        on_edit: Callable[[], None],
        on_compact: Callable[[], None],
    ) -> None:
        self.model = model
        self.layers: list[WatchedLayer] = []
        self.network: NetworkWatch | None = None
        self._others: list[Watch] = []
        held = {id(p) for p in trained}
        if not held:
            return
        for name, module in model.named_modules():
            form = form_of(module)
            if form is not None and id(module.weight) in held:
                self.layers.append(WatchedLayer(name, module, form, on_training, on_edit))
        pools, chains = sequentials(model, self.layers)
        root = next((chain for chain in chains if chain.module is model), None)
        self._others = [*pools, *(chain for chain in chains if chain is not root)]
        if not any(layer.module is model for layer in self.layers) and len(list(model.modules())) > 1:
            self.network = NetworkWatch(model, root, on_training, on_compact)
        self.watch()

    def watch(self, on: bool = True) -> None:
        """Stand between the modules and their calls, or not."""
        for watch in (*self.layers, *self._others, *([] if self.network is None else [self.network])):
            watch.watch() if on else watch.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside, the modules are what they were."""
        self.watch(False)
        try:
            yield
        finally:
            self.watch()

    def of(self, weight: Tensor) -> list[WatchedLayer]:
        """The layers that have this weight."""
        return [layer for layer in self.layers if layer.weight is weight]

    def late(self, trained: Collection[Tensor]) -> list[str]:
        """The names of layers that would be watched, had they been there in the beginning."""
        held, known = {id(p) for p in trained}, {layer.module for layer in self.layers}
        return [
            name
            for name, module in self.model.named_modules()
            if module not in known and form_of(module) is not None and id(module.weight) in held
        ]

    def compute_with(self, lives: dict[WatchedLayer, Live]) -> None:
        """These layers compute with their live weights alone, all others as ever."""
        for layer in self.layers:
            layer.live = lives.get(layer)

    def let_wait(self, lives: list[Live]) -> None:
        """Weights that no layer reads are written when somebody looks at them."""
        for live in lives:
            layers = self.of(live.full)
            if layers and all(layer.live is live for layer in layers):
                live.wait()

    def operations(self, *, restricted: bool) -> Iterator[tuple[float, float]]:
        """Per layer, the floating-point operations of the last step, by formula, and those of a dense one."""
        compact = None if self.network is None else self.network.compact
        for layer in self.layers:
            work, share = 3 * layer.work, 1.0
            if layer.live is not None:
                share = layer.live.pattern.density
                if layer.live.near is not None and restricted:
                    share += layer.live.near.density / 3
                if not restricted:  # a fine step on the live weights, but for the gradient
                    share = (2 * share + 1) / 3 if layer.form.adds_whole else 1.0
            elif compact is not None:
                share = compact.shares.get(layer.name, 1.0)
            yield work * share, work
