"""`optimize_for_inference`: every layer dense or sparse, whichever measured faster, and chains of layers in one call.

A chain (Linear or Conv2d, its activation and pooling, the next Linear …) whose layers all measured faster sparse
becomes a `Chain`: tables of its live weights, and one call of a compiled loop for the whole of it.
"""

from __future__ import annotations

import copy
import operator
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .. import kernels
from ..compare import close
from ..shrink import compact
from ..text import table
from ..timing import race
from .chain import WAYS, Chain, Layer, Unfit, follow, hooked, layers_of

TOLERANCE = 1e-5  # of the largest output
MARGIN = 0.97  # a way is taken if it needs less than this share of the other's time: nearer is noise
SECONDS = 0.2  # spent on one comparison


@dataclass(frozen=True)
class LayerChoice:
    """How one Linear or Conv2d computes, and the seconds that decided; None where it was not measured."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense: float | None
    sparse: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class InferenceReport:
    """What was chosen and why. `dense` and `seconds`: of the given network and of the result, for `batch` samples."""

    layers: tuple[LayerChoice, ...]
    batch: int
    threads: int
    dense: float
    seconds: float
    result: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("layer", "weight", "density", "dense µs", "sparse µs", "chosen", "why")
        rows = [
            (c.name, "×".join(map(str, c.shape)), f"{c.density:.1%}", _microseconds(c.dense), _microseconds(c.sparse),
             c.chosen, c.why)
            for c in self.layers
        ]  # fmt: skip
        whole = (
            f"batch {self.batch}, {self.threads} threads: dense {_microseconds(self.dense)} µs, "
            f"this {_microseconds(self.seconds)} µs"
        )
        gain = (
            f"{self.dense / self.seconds:.2f} times as fast: {self.result}"
            if self.seconds < self.dense
            else self.result
        )
        return "\n".join([table([head, *rows], left={0, 1, 5, 6}), f"{whole}, {gain}", *self.notes])


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"


# ---- What is measured


def _race(
    jobs: dict[str, Callable[[], object]], seconds: float | None = None, of: Callable[[list[float]], float] = min
) -> dict[str, float]:
    """Seconds of a call of each: the least, for what else the machine does only adds."""
    times = race(jobs, 2, seconds=SECONDS if seconds is None else seconds)
    return {name: of([second for row in rows for second in row]) for name, rows in times.items()}


def _fastest(modules: list[nn.Module], x: Tensor) -> Chain:
    """The chain of these modules that is the fastest for such an input; `Unfit` if there is none."""
    reason = "no way through it"
    wanted, chains = nn.Sequential(*modules)(x.clone()), dict[str, Chain]()
    for way in WAYS:
        try:
            chain = Chain(modules, tuple(x.shape[1:]), way)
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
    seconds = _race(jobs, of=statistics.median)  # not the least: where cores are shared, threads often wait
    return chains[min(seconds, key=seconds.__getitem__)]


# ---- Where the layers are in a network


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
class _Site:
    """A layer in its network: what it is there, and what comes in on the example."""

    layer: Layer | None
    name: str
    module: nn.Module
    x: Tensor | None
    follows: bool = False  # the layer before it gives to nothing but this one
    why: str = ""


class _Traced:
    """A network whose operations torch.fx shows."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module = fx.symbolic_trace(model)
        values = _Values(self.module)
        values.run(*inputs)
        for node in list(self.module.graph.nodes):
            _as_module(self.module, node, values.values)
        self.module.graph.eliminate_dead_code()
        self.folded = self._fold(values.values)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.sites = list(self._sites(values.values))

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

    def _sites(self, values: dict[str, Any]) -> Iterator[_Site]:
        last: Layer | None = None  # the chain so far ends with it
        flat: list[fx.Node] = []  # in front of the first layer
        for node in self.module.graph.nodes:
            module, source = _module(self.module, node), node.args[0] if node.args else None
            if module is None or not isinstance(source, fx.Node):
                continue
            alone = len(source.users) == 1
            if type(module) in (nn.Linear, nn.Conv2d):
                after = last is not None and alone and source.name == last.nodes[-1]
                before = flat if flat and flat[-1] is source and alone else []
                x = values[before[0].all_input_nodes[0].name if before else source.name]
                try:
                    layers = layers_of([*(_module(self.module, n) for n in before), module], tuple(x.shape[1:]))  # type: ignore[list-item]
                    last = layers[0]
                    last.name, last.nodes = str(node.target), [*(n.name for n in before), node.name]
                    yield _Site(last, last.name, module, x, after)
                except Unfit as error:
                    last = None
                    yield _Site(None, str(node.target), module, None, False, str(error))
            elif last is not None and alone and source.name == last.nodes[-1]:
                try:
                    follow(last, module)
                    last.nodes.append(node.name)
                except Unfit:
                    last = None
            elif type(module) is nn.Flatten:
                flat = [node]

    def build(
        self, sites: list[_Site], chosen: list[bool], way: Callable[[list[nn.Module], Tensor], Chain]
    ) -> nn.Module:
        """The network with every run of chosen layers as a chain; the chain alone, if that is all of it."""
        module = copy.deepcopy(self.module)
        nodes = {node.name: node for node in module.graph.nodes}
        runs: list[list[_Site]] = []
        for i, site in enumerate(sites):
            if chosen[i] and site.layer is not None:
                if runs and i and chosen[i - 1] and site.follows:
                    runs[-1].append(site)
                else:
                    runs.append([site])
        for number, run in enumerate(runs):
            names = [name for site in run for name in site.layer.nodes]  # type: ignore[union-attr]
            chain = way([m for site in run for m in site.layer.modules], run[0].x)  # type: ignore[union-attr, arg-type]
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


class _Untraced:
    """A network that torch.fx cannot trace: its Linear and Conv2d one by one."""

    folded = 0

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module, self.sites = model, list[_Site]()
        seen: dict[str, list[Any]] = {}
        hooks = []
        layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d) and not hooked(m)}
        for name, module in layers.items():
            take = seen.setdefault(name, []).append
            hooks.append(module.register_forward_pre_hook(lambda _, args, take=take: take(args)))
        model(*inputs)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            args = seen[name]
            try:
                if not args or len(args[0]) != 1:
                    raise Unfit("it was not called with one tensor")
                x = args[0][0].clone()
                layer = layers_of([module], tuple(x.shape[1:]))[0]
                self.sites.append(_Site(layer, name, module, x))
            except Unfit as error:
                self.sites.append(_Site(None, name, module, None, why=str(error)))

    def build(
        self, sites: list[_Site], chosen: list[bool], way: Callable[[list[nn.Module], Tensor], Chain]
    ) -> nn.Module:
        """The network with every chosen layer as a chain of its own."""
        model = copy.deepcopy(self.module)
        for site, sparse in zip(sites, chosen, strict=True):
            if sparse and site.layer is not None and site.x is not None:
                model.set_submodule(site.name, way(site.layer.modules, site.x))
        return model


_FUSE: dict[tuple[type, type], Callable[[Any, Any], nn.Module]] = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls with one tensor."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return root.get_submodule(str(node.target))


# An operation as the module that is the same: (its options in order, the module made of them).
_OPTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., nn.Module]]] = {}
for _names, _options, _make in (
    ((torch.relu, F.relu, "relu"), ("inplace",), nn.ReLU),
    ((torch.sigmoid, F.sigmoid, "sigmoid"), (), nn.Sigmoid),
    ((torch.tanh, F.tanh, "tanh"), (), nn.Tanh),
    ((F.silu,), ("inplace",), nn.SiLU),
    ((F.gelu,), ("approximate",), nn.GELU),
    ((F.relu6,), ("inplace",), nn.ReLU6),
    ((F.leaky_relu,), ("negative_slope", "inplace"), nn.LeakyReLU),
    (
        (torch.flatten, "flatten"),
        ("start_dim", "end_dim"),
        lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    ),
    (
        (F.max_pool2d, torch.max_pool2d),
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        lambda kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: nn.MaxPool2d(
            kernel_size, stride, padding, dilation, return_indices, ceil_mode
        ),
    ),
):
    for _name in _names:
        _OPTIONS[_name] = _options, _make


def _as_module(root: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    """Turn a call of a function, such as F.relu, into one of its module, which is easier to recognise."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    if node.target in ("view", "reshape"):
        if not _flattens(node, values):
            return
        module: nn.Module = nn.Flatten()
    elif node.target is F.dropout and not node.kwargs.get("training", True):
        module = nn.Identity()
    elif node.target in _OPTIONS:
        options, make = _OPTIONS[node.target]
        given = {**dict(zip(options, node.args[1:], strict=False)), **node.kwargs}
        if (
            not all(isinstance(value, int | float | str | tuple | None) for value in given.values())
            or len(node.args) > len(options) + 1
        ):
            return
        given = {name: value for name, value in given.items() if name in options}
        module = make(**given)
    else:
        return
    name = f"as_module_{node.name}"
    root.add_submodule(name, module.eval())
    with root.graph.inserting_before(node):
        call = root.graph.call_module(name, (source,))
    values[call.name] = values[node.name]
    node.replace_all_uses_with(call)
    root.graph.erase_node(node)


def _flattens(node: fx.Node, values: dict[str, Any]) -> bool:
    """Whether it is x.view(len(x), -1) or x.view(-1, n): the batch stays, whatever its size."""
    x, y = values[node.all_input_nodes[0].name], values[node.name]
    if not isinstance(x, Tensor) or y.dim() != 2 or len(y) != len(x) or len(node.args) != 3:
        return False
    first = node.args[1]
    if not isinstance(first, fx.Node):
        return bool(first == -1)
    if first.op == "call_method" and first.target == "size":
        return first.args[1:] == (0,)
    if first.target is operator.getitem and first.args[1] == 0 and isinstance(first.args[0], fx.Node):
        shape = first.args[0]
        return shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape")
    return False


# ---- The whole


class InferenceModule(nn.Module):
    """What `optimize_for_inference` returns: called like the network it was made of; `report` says what it does."""

    def __init__(self, network: nn.Module, report: InferenceReport) -> None:
        super().__init__()
        self.network, self.report = network, report
        self.eval()
        if isinstance(network, Chain):  # nothing in between
            self.forward = network.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def optimize_for_inference(model: nn.Module, example_inputs: tuple[Any, ...]) -> InferenceModule:
    """A copy of `model` in eval mode that computes the same, faster where that was measured.

    Units that do nothing are removed, BatchNorm is folded into the layer before it, and every Linear and Conv2d
    computes densely or on its live weights alone, whichever was faster for these inputs on this machine with torch's
    present number of threads. Neighbours that are sparse become one call, with their activations and poolings. If all
    that is not faster than the network as it was, the result is the network as it was. Measuring takes about half a
    second per layer; measure where nothing else runs.

    The outputs are those of `model.eval()` up to 1e-5 of the largest, checked on the example. Other batch sizes
    compute right as well, and what the sparse loops cannot take (another dtype or device, or inputs that ask for a
    gradient) goes through torch. The weights are a snapshot, and ask for no gradient. Sparse layers leave out what is
    multiplied by zero, so an infinite input does not become NaN there. Several threads may call the result at once.

    Args:
        model: any network; it is not changed. What torch.fx cannot trace is treated layer by layer.
        example_inputs: the positional arguments, such as `(x,)` with x of the batch size that is to be fast.

    Raises:
        TypeError: `model` is no module, or `example_inputs` no tuple.
        ValueError: the network cannot be called with `example_inputs`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(example_inputs, tuple) or not any(isinstance(x, Tensor) for x in example_inputs):
        raise TypeError(
            f"`example_inputs` is {type(example_inputs).__name__}; expected a tuple of the arguments, such as (x,)."
        )
    with torch.no_grad():
        dense = copy.deepcopy(model).eval().requires_grad_(False)
        try:
            wanted = dense(*example_inputs)
        except Exception as error:
            raise ValueError(
                f"`example_inputs` do not fit: {type(model).__name__} raised {type(error).__name__}: {error}"
            ) from error
        return _optimized(dense, example_inputs, wanted)


def _optimized(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> InferenceModule:
    notes: list[str] = []
    networks: dict[str, nn.Module] = {"dense": dense}
    plan: _Traced | _Untraced
    before: nn.Module
    try:
        traced = plan = _Traced(dense, inputs)
        folded, before = plan.folded, plan.module
        small = _compact(before, inputs, notes)  # with the norms folded a dead unit has no shift of its own
        if small is not before:
            plan = _Traced(small, inputs)
        for found in (traced, plan):
            if not close(found.module(*inputs), wanted, TOLERANCE):
                raise RuntimeError("the trace computes something else")
    except Exception as error:
        lines = str(error).splitlines() or [""]
        notes.append(f"torch.fx cannot trace the network ({lines[0]}): layers one by one, no BatchNorm folded.")
        folded, before = 0, dense
        small = _compact(dense, inputs, notes)
        plan = _Untraced(copy.deepcopy(small), inputs)
    if folded or small is not before:
        networks["dense, simplified"] = plan.module
    if any(isinstance(m, nn.Conv2d) for m in plan.module.modules()):
        channels_last: Any = {"memory_format": torch.channels_last}
        networks["dense, channels last"] = copy.deepcopy(plan.module).to(**channels_last)
    sites = plan.sites
    reason = _reason(inputs)
    fast: dict[tuple[int, ...], Chain] = {}

    def fastest(modules: list[nn.Module], x: Tensor) -> Chain:
        key = tuple(map(id, modules))
        if key not in fast:
            fast[key] = _fastest(modules, x)
        return fast[key]

    choices = [_choice(site, reason, fastest) for site in sites]
    chosen = [choice.chosen == "sparse" for choice in choices]
    able = [choice.sparse is not None for choice in choices]
    plans = {"sparse where each layer alone was faster": chosen, "sparse wherever it can be": able}
    for name, which in plans.items():
        if any(which) and not (which is able and able == chosen):
            try:
                networks[name] = plan.build(sites, which, fastest)
            except Unfit as error:
                notes.append(f"{name}: {error}.")
    for name in list(networks)[1:]:
        try:
            right = close(networks[name](*inputs), wanted, TOLERANCE)
        except Exception:  # a network that looks into its own layers finds something else there
            right = False
        if not right:
            del networks[name]
            notes.append(f"{name}: the outputs are not those of the dense network, so it is not used.")
    seconds = _race({name: lambda n=n: n(*inputs) for name, n in networks.items()}, 2 * SECONDS)  # type: ignore[misc]
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > MARGIN * seconds["dense"]:
        best = "dense"
        notes.append("Nothing was faster than the dense network, so the result is the dense network.")
    chosen = plans.get(best, [False] * len(sites))
    choices = [_settled(choice, sparse) for choice, sparse in zip(choices, chosen, strict=True)]
    if small is not before and best != "dense":
        notes.append(f"Units that do nothing removed: {_size(dense):,} parameters before, {_size(small):,} after.")
    if folded and best != "dense":
        notes.append(f"BatchNorm folded into the layer before it: {folded}.")
    chains = [m for m in networks[best].modules() if isinstance(m, Chain)]
    if ways := sorted({m.way if m.spread else f"{m.way} on one thread" for m in chains}):
        notes.append(f"Chains go through {' and '.join(ways)}.")
    batch = next(len(x) if x.dim() else 1 for x in inputs if isinstance(x, Tensor))
    report = InferenceReport(
        tuple(choices), batch, torch.get_num_threads(), seconds["dense"], seconds[best], best, tuple(notes)
    )
    return InferenceModule(networks[best], report)


def _compact(model: nn.Module, inputs: tuple[Any, ...], notes: list[str]) -> nn.Module:
    """The network without the units that do nothing, if it has fewer weights that are not zero."""
    tensors = all(isinstance(x, Tensor) for x in inputs)
    try:
        small = compact(model, inputs) if tensors else model
    except (TypeError, ValueError, RuntimeError) as error:
        notes.append(f"Nothing was removed: {error}.")
        return model
    if _live(small) > _live(model):  # two factors of low rank instead of a sparse matrix
        return model
    return small.eval().requires_grad_(False)


def _live(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _reason(inputs: tuple[Any, ...]) -> str:
    """Why no layer can be sparse, whatever it is; empty if it can."""
    if not kernels.available():
        return "Numba is not installed: pip install 'torch-bregman[fast]'"
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs):
        return "the inputs are not on a CPU"
    return ""


def _choice(site: _Site, reason: str, fastest: Callable[[list[nn.Module], Tensor], Chain]) -> LayerChoice:
    """Dense or sparse, for this layer alone."""
    weight: Tensor = site.module.weight  # type: ignore[assignment]
    what = site.name, tuple(weight.shape), torch.count_nonzero(weight).item() / max(1, weight.numel())
    reason = reason or site.why
    if not reason and site.layer is not None and site.x is not None:
        modules, x = site.layer.modules, site.x
        try:
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise Unfit(f"the input is {x.dtype} on {x.device}; the kernels need float32 on a CPU")
            dense, chain = nn.Sequential(*modules), fastest(modules, x)
        except Unfit as error:
            reason = str(error)
        else:
            took = _race({"dense": lambda: dense(x), "sparse": lambda: chain(x)})
            a, b = took["dense"], took["sparse"]
            faster = b < MARGIN * a
            why = f"sparse is {a / b:.1f} times as fast" if faster else f"sparse takes {b / a:.1f} times as long"
            return LayerChoice(*what, a, b, "sparse" if faster else "dense", why)
    return LayerChoice(*what, None, None, "dense", reason)


def _settled(choice: LayerChoice, sparse: bool) -> LayerChoice:
    """The choice that the whole network made of it."""
    chosen = "sparse" if sparse else "dense"
    if chosen == choice.chosen:
        return choice
    return replace(choice, chosen=chosen, why=f"{choice.why} alone, but the whole is faster this way")
