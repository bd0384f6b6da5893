"""Layers that are written as functions: F.linear(x, self.weight, self.bias) is a Linear, whoever holds the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn import functional as F

from ..heads import Edit, HeadsWalk
from ..walk import Walk, Wire, barrier, options
from .base import Kind, of, register
from .conv import Convolution
from .linear import Linear
from .norm import BatchNorm, GroupNorm


class CalledLinear(Linear):
    """Without a bias in the call there is no place for the constants of inputs: a channel has to carry them."""

    needs_carrier = True

    def padded(self, module: Any) -> bool:
        return module.bias is None or super().padded(module)


class CalledConvolution(Convolution):
    needs_carrier = True

    def padded(self, module: Any) -> bool:
        return module.bias is None or super().padded(module)


class _Linear(nn.Linear):
    pass


class _Conv1d(nn.Conv1d):
    pass


class _Conv2d(nn.Conv2d):
    pass


class _Conv3d(nn.Conv3d):
    pass


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    pass


class _GroupNorm(nn.GroupNorm):
    pass


_kinds: list[Kind] = [CalledConvolution(cls, dims) for dims, cls in enumerate((_Conv1d, _Conv2d, _Conv3d), 1)]
_kinds += [CalledLinear(_Linear), BatchNorm(_BatchNorm), GroupNorm(_GroupNorm)]
for _kind in _kinds:
    _kind.arguments = None  # no file holds one
    register(_kind)

#: attributes that say how large a layer is
SIZES = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_groups",
    "num_channels",
)  # fmt: skip


class _Node(NamedTuple):
    """The call of a layer."""

    target: str
    args: tuple[fx.Node, ...]
    all_input_nodes: list[fx.Node]
    kwargs: dict[str, Any]


def _linear(weight: Any, **given: Any) -> nn.Module:
    outputs, inputs = weight.shape
    return _Linear(inputs, outputs, bias=given["bias"] is not None, device="meta")


def _convolution(weight: Any, **given: Any) -> nn.Module:
    where = {name: given[name] for name in ("stride", "padding", "dilation", "groups") if name in given}
    outputs, inputs, *kernel = weight.shape
    layer: Any = (_Conv1d, _Conv2d, _Conv3d)[len(kernel) - 1]
    bias = given.get("bias") is not None
    return layer(inputs * where.get("groups", 1), outputs, kernel, **where, bias=bias, device="meta")


def _batch_norm(weight: Any, **given: Any) -> nn.Module:
    mean = given["running_mean"]
    affine, tracks = weight is not None, mean is not None
    layer = _BatchNorm(
        len(weight if affine else mean), given.get("eps", 1e-5), None, affine, tracks,
        bias=given.get("bias") is not None, device="meta",
    )  # fmt: skip
    return layer.train(given.get("training", False))


def _group_norm(weight: Any, **given: Any) -> nn.Module:
    return _GroupNorm(given["num_groups"], len(weight), given.get("eps", 1e-5), bias=given.get("bias") is not None)


CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
#: function → the names of its arguments, what builds the layer, and which argument is a number of channels
CALLED: dict[Any, tuple[tuple[str, ...], Callable[..., nn.Module], str | None]] = {
    F.linear: (("input", "weight", "bias"), _linear, None),
    F.conv1d: (CONVOLUTION, _convolution, "groups"),
    F.conv2d: (CONVOLUTION, _convolution, "groups"),
    F.conv3d: (CONVOLUTION, _convolution, "groups"),
    F.batch_norm: (NORM, _batch_norm, None),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), _group_norm, "num_groups"),
}
TENSORS = ("weight", "bias", "running_mean", "running_var")


def called(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Follow the layer that a call stands for, if its tensors are attributes that nobody else reads."""
    assert isinstance(walk, HeadsWalk)
    names, build, counted = CALLED[node.target]
    given = options(node, *names)
    source = given.pop("input", None)
    nodes = {name: given[name] for name in TENSORS if given.get(name) is not None}
    own = {name: walk.owned.get(str(n.target)) for name, n in nodes.items() if isinstance(n, fx.Node)}
    plain = isinstance(source, fx.Node) and len(node.all_input_nodes) == 1 + len(nodes)
    if not (plain and own and len(own) == len(nodes)) or any(len(n.users) > 1 for n in nodes.values()):
        return barrier(walk, node, module)
    ready = all(
        tensor is not None and isinstance(tensor, nn.Parameter) == (name in ("weight", "bias"))
        for name, tensor in own.items()
    )
    if not ready or own.keys() == {"bias"}:
        return barrier(walk, node, module)
    layer = build(**{"weight": None, "bias": None, **given, **own})
    for name, tensor in own.items():
        setattr(layer, name, tensor)
    tensors = {name: str(n.target) for name, n in nodes.items()}
    first = next(iter(tensors.values()))
    owner = walk.modules[first.rpartition(".")[0]]
    number = None if counted is None else getattr(layer, counted)
    if number not in (None, 1) and not (_is_a(owner, layer) and getattr(owner, str(counted)) == number):
        return barrier(walk, node, module)
    count = len(walk.calls)
    wire = of(layer).follow(walk, _Node(first, (source,), [source], {}), layer)  # type: ignore[arg-type]
    if len(walk.calls) > count:
        walk.calls[-1] = walk.calls[-1]._replace(tensors=tensors)
        if number not in (None, 1) and wire is not None:
            at: Any = names.index(str(counted))
            each = wire.ids[:: max(len(wire.ids) // number, 1)]
            walk.spelled.append(Edit(node, at if at < len(node.args) else str(counted), None, each, 1))
    return wire


def _is_a(owner: nn.Module, layer: nn.Module) -> bool:
    return isinstance(owner, type(layer).__mro__[1])


def resize(owner: Any, layer: nn.Module) -> None:
    """Tell the module that holds the tensors of a layer how large it is now."""
    if _is_a(owner, layer):
        for name in SIZES:
            if hasattr(owner, name) and hasattr(layer, name):
                setattr(owner, name, getattr(layer, name))
