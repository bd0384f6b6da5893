"""Where the layers are in a network, what comes in there, and the network with chains in their places."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..compare import close
from ..network.tracer import Tracer
from .attention import WHOLE, SplitAttention, SplitEncoder, put
from .chain import Chain
from .functions import as_module
from .links import Link, Unfit, follow, hooked, links_of, sample

TOLERANCE = 1e-5  # of the largest output

MakeChain = Callable[[list[nn.Module], Tensor], Chain]


class _Values(fx.Interpreter):
    """What comes out of every node on the example."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value  # it may be changed in place
        return value


@dataclass
class Site:
    """A layer in its network: what it is there, and what comes in on the example."""

    link: Link | None
    name: str
    module: nn.Module
    x: Tensor | None
    follows: bool = False  # the layer before it gives to nothing but this one
    why: str = ""
    inside: bool = False  # of a module that the trace shows as one call


class _Steps(Tracer):
    """What is traced for inputs of all sizes, so that no condition is decided by those at hand."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        return fx.Tracer.to_bool(self, obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SplitAttention | SplitEncoder) or super().is_leaf_module(m, module_qualified_name)


class Traced:
    """A network whose operations torch.fx shows."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        tracer = _Steps(())
        graph = tracer.trace(model)
        graph._tracer_cls = fx.Tracer  # which reads the code when the network is loaded from a pickle
        for node in graph.nodes:
            node.type = None  # an annotation that is a string cannot be pickled
        self.module = fx.GraphModule(tracer.root, graph, type(model).__name__)
        values, called = _Values(self.module), {str(node.target) for node in graph.nodes if node.op == "call_module"}
        with _Watch(self.module, called) as watch:
            values.run(*inputs)
        for node in list(self.module.graph.nodes):
            as_module(self.module, node, values.values)
        self.module.graph.eliminate_dead_code()
        self.folded = self._fold(values.values)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.sites = [*self._sites(values.values), *watch.sites(inside=True)]

    def _fold(self, values: dict[str, Any]) -> int:
        """Norms into the layers before them, where that rounds to the same; returns how many."""
        uses = Counter(node.target for node in self.module.graph.nodes if node.op == "call_module")
        folded = 0
        for node in list(self.module.graph.nodes):
            norm, before = _module(self.module, node), node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or len(before.users) > 1 or uses[before.target] > 1:
                continue
            layer, fuse = _module(self.module, before), _FUSE.get((type(_module(self.module, before)), type(norm)))
            if fuse is None or norm.running_mean is None or hooked(norm) or hooked(layer):  # type: ignore[arg-type, union-attr]
                continue
            fused = fuse(layer, norm)
            source = before.args[0]
            if isinstance(source, fx.Node) and close(fused(values[source.name]), values[node.name], TOLERANCE):
                self.module.set_submodule(str(before.target), fused)
                values[before.name] = values[node.name]
                node.replace_all_uses_with(before)
                self.module.graph.erase_node(node)
                folded += 1
        return folded

    def _sites(self, values: dict[str, Any]) -> Iterator[Site]:
        last: Link | None = None  # the chain so far ends with it
        flat: list[fx.Node] = []  # in front of the first layer
        for node in self.module.graph.nodes:
            module, source = _module(self.module, node), node.args[0] if node.args else None
            if module is None or not isinstance(source, fx.Node):
                continue
            alone = len(source.users) == 1
            if type(module) in (nn.Linear, nn.Conv2d):
                before = flat if flat and flat[-1] is source and alone else []
                x = values[before[0].all_input_nodes[0].name if before else source.name]
                try:
                    link = link_of([*(_module(self.module, n) for n in before), module], x)  # type: ignore[list-item]
                    link.name, link.nodes = str(node.target), [*(n.name for n in before), node.name]
                    after = last is not None and alone and source.name == last.nodes[-1]
                    after = after and (last.result, last.batched) == (link.source, link.batched)  # type: ignore[union-attr]
                    last = link
                    yield Site(link, link.name, module, x, after)
                except Unfit as error:
                    last = None
                    yield Site(None, str(node.target), module, None, False, str(error))
            elif last is not None and alone and source.name == last.nodes[-1]:
                try:
                    follow(last, module)
                    last.nodes.append(node.name)
                except Unfit:
                    last = None
            elif type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
                flat = [node]

    def build(self, chosen: list[bool], make: MakeChain) -> nn.Module:
        """The network with every run of `chosen` sites as a chain; the chain alone, if that is all of it."""
        module = copy.deepcopy(self.module)
        nodes = {node.name: node for node in module.graph.nodes}
        runs: list[list[Site]] = []
        for i, site in enumerate(self.sites):
            if chosen[i] and site.inside and site.link is not None:
                put(module, site.name, make(site.link.modules, site.x))  # type: ignore[arg-type]
            elif chosen[i] and site.link is not None:
                if runs and i and chosen[i - 1] and site.follows:
                    runs[-1].append(site)
                else:
                    runs.append([site])
        for number, run in enumerate(runs):
            names = [name for site in run for name in site.link.nodes]  # type: ignore[union-attr]
            chain = make([m for site in run for m in site.link.modules], run[0].x)  # type: ignore[union-attr, arg-type]
            first, last = nodes[names[0]], nodes[names[-1]]
            module.add_submodule(f"chain_{number}", chain)
            with module.graph.inserting_before(first):
                call = module.graph.call_module(f"chain_{number}", (first.args[0],))
            last.replace_all_uses_with(call)
            for name in reversed(names):
                module.graph.erase_node(nodes[name])
            if [node.op for node in module.graph.nodes] == ["placeholder", "call_module", "output"] and (
                list(module.graph.nodes)[-1].args == (call,)
            ):
                return chain
        module.delete_all_unused_submodules()
        module.recompile()
        return module


class Untraced:
    """A network that torch.fx cannot trace: its Linear and Conv2d one by one."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module = model
        with _Watch(model) as watch:
            model(*inputs)
        self.sites = [*watch.sites()]

    def build(self, chosen: list[bool], make: MakeChain) -> nn.Module:
        """The network with every one of the `chosen` sites as a chain of its own."""
        model = copy.deepcopy(self.module)
        for site, sparse in zip(self.sites, chosen, strict=True):
            if sparse and site.link is not None and site.x is not None:
                put(model, site.name, make(site.link.modules, site.x))
        return model


class _Watch:
    """Notes what comes into the Linear and Conv2d of a network that are called by their modules.

    `seen`: those that are looked after elsewhere.
    """

    def __init__(self, model: nn.Module, seen: Collection[str] = ()) -> None:
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, nn.Conv2d) and not hooked(module)
            and name not in seen and WHOLE not in name.split(".")
        }  # fmt: skip
        self.calls: dict[str, list[Any]] = {name: [] for name in self.layers}

    def __enter__(self) -> _Watch:
        self.hooks = [
            module.register_forward_pre_hook(lambda _, args, take=self.calls[name].append: take(args))
            for name, module in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def sites(self, inside: bool = False) -> Iterator[Site]:
        for name, module in self.layers.items():
            calls = self.calls[name]
            try:
                if not calls or len(calls[0]) != 1:
                    raise Unfit("it was not called with one tensor")
                x = calls[0][0].clone()
                yield Site(link_of([module], x), name, module, x, inside=inside)
            except Unfit as error:
                yield Site(None, name, module, None, why=str(error), inside=inside)


def link_of(modules: list[nn.Module], x: Tensor) -> Link:
    """The link of a layer, and of a Flatten in front of it, where `x` comes in; `Unfit` where there is none."""
    link = links_of(modules, sample(modules[0], x))[0]
    link.batched = x.dim() == 2 or not isinstance(modules[0], nn.Linear)
    return link


_FUSE: dict[tuple[type, type], Callable[[Any, Any], nn.Module]] = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls with one tensor."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return root.get_submodule(str(node.target))
