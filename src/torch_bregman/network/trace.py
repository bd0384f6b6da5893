"""A network as torch.fx sees it, checked against what it computes; nothing about the network changes."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..compare import difference
from . import kinds
from .tracer import Tracer, hooked
from .walk import Trace


class Untraceable(ValueError):  # noqa: N818 - it says what the network is
    """The network cannot be followed by torch.fx."""


@contextmanager
def leaving_unchanged(*models: nn.Module) -> Iterator[None]:
    """Inside, no gradients; afterwards attributes, training flags, buffers and random numbers are what they were."""
    modules = {id(m): m for model in models for m in model.modules()}.values()
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    values = [(b, b.clone()) for _, _, buffers in attributes for b in buffers.values() if b is not None]
    devices = {t.device for m in models for t in [*m.parameters(), *m.buffers()] if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            yield
        finally:
            for module, members, buffers in attributes:
                module.__dict__.clear()
                module.__dict__.update(members)
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, before in values:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def without_noise(*models: nn.Module, norms: bool = True, leaves: bool = False) -> None:
    """Dropout (and norms) in eval mode: no noise, and no demands on the batch; `leaves`: of those that are one call."""
    for model in models:
        for module in model.modules():
            kind = kinds.of(module)
            if (kind.noise or (norms and kind.statistics)) and (kind.leaf or not leaves):
                module.training = False


class _Shapes(fx.Interpreter):
    """Runs the traced graph and notes the shape of every tensor in it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    if patched := [name or "the model" for name, m in model.named_modules() if "forward" in m.__dict__]:
        raise Untraceable(f"{patched[0]} has a `forward` of its own instead of its class's; expected a plain module.")
    with leaving_unchanged(model):
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
            fixed = {p.name: p.default for p in parameters if p.default is not p.empty}
            graph = Tracer(inputs).trace(model, concrete_args=fixed or None)
            _without_defaults(graph, len(inputs))
            without_noise(model, leaves=True)  # whatever else asks for its mode was traced in it
            interpreter = _Shapes(model, graph)
            with torch.random.fork_rng(devices=[x.device for x in inputs if x.device.type == "cuda"]):
                traced = interpreter.run(*[x.clone() for x in inputs], enable_io_processing=False)
            actual = model(*[x.clone() for x in inputs])
        except Exception as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise Untraceable(
                f"{type(model).__name__} cannot be traced by torch.fx on these inputs ({reason})."
            ) from error
        # An operation in place that the trace shows as a new tensor, or state that changes from call to call.
        if not all(map(_agree, tree_leaves(traced), tree_leaves(actual))):
            raise Untraceable(f"{type(model).__name__} as traced by torch.fx does not compute what the model computes.")
    return Trace(list(graph.nodes), interpreter.shapes, _fixed(model, graph), _owned(model, graph))


def _agree(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return not both or not a.is_floating_point() or difference(a, b) <= 1e-3


def _without_defaults(graph: fx.Graph, inputs: int) -> None:
    """Arguments that keep their defaults are none of the traced network, and neither is what torch.fx says of them."""
    for node in [node for node in graph.nodes if node.op == "placeholder"][inputs:]:
        after = [node]
        for n in after:
            after += [user for user in n.users if user not in after]
        if all(n is node or n.target is operator.eq or "_assert" in getattr(n.target, "__name__", "") for n in after):
            for n in reversed(after):
                graph.erase_node(n)


def _fixed(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules whose weights have another use than one plain call: called twice, tied, read by the network, hooked."""
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return read | {
        name
        for name, module in model.named_modules()
        if hooked(module)
        or any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None)
        or (calls[name] > 1 and (module._parameters or module._buffers))
    }


def _owned(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """The parameters and buffers that the code of the network reads in one place, and no module that it calls."""
    reads = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr")
    called = tuple(f"{n.target}." for n in graph.nodes if n.op == "call_module")
    own = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if reads[name] == 1]
    owners = Counter(id(t) for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()])
    return {name: t for name, t in own if owners[id(t)] == 1 and not name.startswith(called)}
