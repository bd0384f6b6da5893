"""How torch.fx goes through a network here: what it sees as one call, as an operation in place, and as a condition."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import kinds

#: torch.nn's own containers with units in them: they are followed step by step where another module calls them
STEPPED = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
#: what says something about a tensor that does not depend on its entries
SIZES = ("shape", "size", "dim", "ndim", "dtype", "device", "numel", "is_floating_point")


def _in_place(name: str) -> Any:
    """x += y, which torch.fx sees as x = x + y."""

    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return write


#: what stands for a tensor while a network is traced
_Proxy = type("_Proxy", (fx.Proxy,), {f"__{n}__": _in_place(n) for n in ("iadd", "isub", "imul", "itruediv", "ipow")})


class Tracer(fx.Tracer):
    """Stock modules and known kinds are leaves, but an encoder layer has hidden units: it is followed step by step."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(param_shapes_constant=True)
        self.inputs = inputs
        self.known: tuple[dict[fx.Node, Any], ...] = ({}, {})
        self.looking = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on sizes is what it is for the inputs at hand; the graph says so where it is run by itself."""
        if not _is_size(obj.node):
            return super().to_bool(obj)
        doubled = tuple(torch.cat([x, x]) if x.dim() else x for x in self.inputs)  # twice as many samples
        self.looking = True
        try:
            trials = zip((self.inputs, doubled), self.known, strict=True)
            found, other = (bool(self._value(obj.node, *trial)) for trial in trials)
        except Exception:  # whatever its own code raises
            return super().to_bool(obj)
        finally:
            self.looking = False
        if found is not other:  # it depends on the number of samples
            return super().to_bool(obj)
        holds = obj if found else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (holds, "The network was traced for other sizes."), {})
        return found

    def _value(self, node: fx.Node, inputs: tuple[Tensor, ...], known: dict[fx.Node, Any]) -> Any:
        """Of a node, for these inputs; `known` holds those of earlier ones."""
        for i, n in enumerate(self.graph.nodes):
            if node in known:
                break
            if n in known:
                continue
            args, kwargs = fx.map_arg((n.args, n.kwargs), known.__getitem__)
            if n.op == "placeholder":
                known[n] = inputs[i].clone() if i < len(inputs) else next(iter(n.args), None)
            elif n.op == "get_attr":
                known[n] = operator.attrgetter(str(n.target))(self.root)
            elif n.op == "call_module":
                known[n] = self.root.get_submodule(str(n.target))(*args, **kwargs)
            elif n.op == "call_method":
                known[n] = getattr(args[0], str(n.target))(*args[1:], **kwargs)
            else:
                known[n] = n.target(*args, **kwargs)
        return known[node]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.looking else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kinds.of(m).leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.looking:
            return forward(*args, **kwargs)
        if type(m) is nn.TransformerEncoderLayer and not hooked(m):
            return _encoder_layer(m, *args, **kwargs)
        # With masks the encoder looks at their values.
        if type(m) is nn.TransformerEncoder and not hooked(m) and len(args) == 1 and not kwargs:
            (x,) = args
            for layer in m.layers:
                x = layer(x)
            return x if m.norm is None else m.norm(x)
        return super().call_module(m, forward, args, kwargs)


def _encoder_layer(
    m: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    """nn.TransformerEncoderLayer.forward without its tests of the input, which torch.fx cannot follow."""

    def attention(x: Any) -> Any:
        return m._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    if m.norm_first:
        x = src + attention(m.norm1(src))
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(src + attention(src))
    return m.norm2(x + m._ff_block(x))


def _is_size(node: fx.Node) -> bool:
    """Whether it depends on sizes alone."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.op not in ("call_function", "call_method"):
            return False
        if node.target in SIZES or (node.target is getattr and node.args[1] in SIZES):
            continue
        waiting += node.all_input_nodes
    return True


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
