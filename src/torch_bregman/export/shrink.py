"""The network without what does not count: the same function in smaller stock modules."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..distributed import require_whole
from ..network import kinds
from ..network.graph import Graph
from ..network.heads import Edit
from ..network.kinds import Kept
from ..network.removable import LAST, RemovableChannels
from ..network.trace import STEPPED, Untraceable, without_noise
from ..network.walk import Call
from ..optim.base import BregmanOptimizer
from ..restriction.compact import Slice, take

TOLERANCE = 1e-5  # of the largest output; in float64, so what is left is the rounding of folded constants
SINGULAR = 1e-6  # of the largest singular value: what is smaller is zero
TRIALS = 2  # random inputs beside the example


@dataclass(frozen=True)
class Row:
    """What became of one layer.

    Attributes:
        name, kind: of the layer in the network that was given.
        before, after: (outputs, inputs) of a layer, (heads, width) of an attention, (columns, rows) of an embedding.
        parameters: before and after.
        kept: dead units that had to stay.
        reason: why they, or the layer as it is, had to stay.
        rank: of two factors that took its place.
    """

    name: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int]
    parameters: tuple[int, int]
    kept: int = 0
    reason: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Report:
    """What `shrink` did, layer by layer; `str()` is a table.

    Attributes:
        rows: one per layer, in the order of the network.
        parameters: of the whole network, before and after.
        difference: the largest difference of the outputs, relative to the largest output, in float64.
        notes: what else there is to know.
    """

    rows: list[Row]
    parameters: tuple[int, int]
    difference: float
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "units", "inputs", "parameters", "")]
        for row in self.rows:
            remark = f"rank {row.rank}: two factors" if row.rank else ""
            if row.reason:
                remark += f"{'; ' if remark else ''}{f'{row.kept} dead stay: ' if row.kept else ''}{row.reason}"
            sizes = (f"{a:,} → {b:,}" if a != b else f"{a:,}" for a, b in zip(row.before, row.after, strict=True))
            lines.append((f"{row.name} ({row.kind})", *sizes, "{:,} → {:,}".format(*row.parameters), remark))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join(
                f"{text:<{w}}" if i == 0 else f"{text:>{w}}"
                for i, (text, w) in enumerate(zip(line, widths, strict=False))
            )
            + (f"  {line[4]}" if line[4] else "")
            for line in lines
        ]
        before, after = self.parameters
        table.append(
            f"{before:,} → {after:,} parameters ({after / max(before, 1):.1%}), outputs within {self.difference:.1e}"
        )
        return "\n".join(table + self.notes)


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` returns.

    Attributes:
        model: the smaller network.
        optimizer: one that goes on with it, or None.
        report: what was done; `print` it.
        parts: which part of which parameter of the original each one of the smaller network is that was cut, as
            `Slice` with `full`, `small` and `index`. Constants may have been added to its values.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    report: Report
    parts: list[Slice]


def shrink(
    model: nn.Module, example_inputs: tuple[Tensor, ...], optimizer: torch.optim.Optimizer | None = None
) -> Shrunk:
    """A smaller network that computes, in eval mode, what `model` computes.

    Units are removed that are constant, because all their weights are zero or all that they read is constant, and units
    that nobody reads, with everything that belongs to them: rows, columns, biases, norms, the inputs of the layers that
    follow. The constants go into what follows. Heads of attention go where their values or what is made of them are
    zero. A layer whose rank is low enough becomes two. What cannot be removed exactly stays, and the report says why.

    The outputs are compared on the example and on random inputs of the same shapes. `model` is not changed; what comes
    out has weights of its own, consists of modules of torch.nn (where heads were removed from nn.MultiheadAttention,
    of `torch_bregman.network.attention.Attention`), and keeps training flags, `requires_grad`, dtypes and devices.
    Where the number of heads, or the size of a view, stands in the network's code, it is a torch.fx.GraphModule.

    Args:
        model: the network. torch.fx has to be able to follow it; if it cannot, only attention heads and ranks shrink.
        example_inputs: what its forward takes, in order. Spatial sizes are those of all later inputs, the batch size
            need not be.
        optimizer: of `model`. A new one of the same class is made for the smaller network, with the state cut along:
            its next step gives the same weights on what was kept. Units whose constant is another one in training,
            where a norm takes the statistics of the batch, stay then, and no layer becomes two.

    Raises:
        TypeError: `example_inputs` are no tensors.
        ValueError: `optimizer` holds parameters that the model does not have, or `model` holds DTensors.
        RuntimeError: the outputs are not the same; then it is an error of this function.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"`example_inputs` is {type(example_inputs).__name__} {example_inputs!r:.80}; expected tensors."
        )
    require_whole(model, "tb.shrink")
    if optimizer is not None:
        _check_optimizer(model, optimizer)
    if isinstance(model, STEPPED) and len(inputs) == 1:
        whole = shrink(nn.Sequential(model), inputs, optimizer)
        rows = [replace(row, name=row.name.partition(".")[2]) for row in whole.report.rows]
        return Shrunk(whole.model.get_submodule("0"), whole.optimizer, replace(whole.report, rows=rows), whole.parts)
    scissors = _Scissors(model)
    scissors.units(inputs, training=optimizer is not None)
    scissors.heads(inputs)
    if optimizer is None:
        scissors.ranks()
    elif any(_is_nuclear(optimizer)):
        scissors.notes.append("No layer became two factors: the state of the optimizer does not split like that.")
    rows = scissors.rows()
    scissors.finish()
    difference = _difference(model, scissors.model, inputs)
    if difference > TOLERANCE:
        raise RuntimeError(
            f"The smaller network differs by {difference:.1e} of the largest output, more than {TOLERANCE:.0e}; "
            "nothing was changed. Please report this network."
        )
    following = None if optimizer is None else _follow(optimizer, model, scissors)
    sizes = tuple(sum(p.numel() for p in m.parameters()) for m in (model, scissors.model))
    report = Report(rows, (sizes[0], sizes[1]), difference, scissors.notes)
    return Shrunk(scissors.model, following, report, [part for parts in scissors.parts.values() for part in parts])


def compact(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """`shrink` for inference alone: constants that depend on the position are added as an image, so none is carried."""
    scissors = _Scissors(model, carry=False)
    scissors.units(inputs, training=False)
    scissors.heads(inputs)
    scissors.ranks()
    scissors.finish()
    return scissors.model


@fx.wrap
def add_image(x: Tensor, image: Tensor) -> Tensor:
    """In place."""
    if x.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"A layer returns {tuple(x.shape[1:])} per sample; the network was made smaller for inputs that give "
            f"{tuple(image.shape[1:])}."
        )
    return x.add_(image)


class AddImage(nn.Module):
    """x + what removed channels contribute, [1, channels, *positions]: memory formats reach four dimensions only."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image)
        self.image: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return add_image(x, self.image)


class _Scissors:
    """A copy of the network that is cut, and which part of which parameter each new one is."""

    def __init__(self, model: nn.Module, *, carry: bool = True) -> None:
        self.original, self.carry = model, carry
        self.model = copy.deepcopy(model).eval()
        for p in self.model.parameters():
            p.grad = None
        self.notes: list[str] = []
        self.code: fx.Graph | None = None  # instead of the original's, where that has to change
        self.parts: dict[nn.Parameter, list[Slice]] = {}  # of the original's parameters
        self.layers: dict[str, dict[str, Any]] = {}  # what is known for the rows of the report
        # Every module of the original, and the one of the copy that is cut.
        self.twins = {name: (old, self.model.get_submodule(name)) for name, old in model.named_modules()}
        for name, module in self.model.named_modules():
            if kinds.of(module).reported:
                self.layers[name] = {"kind": type(module).__name__, "before": _sizes(module), "reason": "", "kept": 0}

    def finish(self) -> None:
        """The cut network, in training or not as the original is."""
        flags = {name: module.training for name, module in self.original.named_modules()}
        for name, module in self.model.named_modules():
            while name not in flags:  # a part of what took a module's place
                name = name.rpartition(".")[0]
            module.training = flags[name]
        if self.code is not None:
            training = self.model.training
            self.model = fx.GraphModule(self.model, self.code, type(self.original).__name__)
            self.model.training = training

    def rows(self) -> list[Row]:
        """What became of each layer."""
        rows = []
        for name, known in self.layers.items():
            old, new = self.original.get_submodule(name), self.model.get_submodule(name)
            counts = tuple(sum(p.numel() for p in m.parameters()) for m in (old, new))
            rows.append(Row(name, parameters=(counts[0], counts[1]), after=_sizes(new), **known))
        return rows

    def cut(
        self, name: str, parameter: str, *index: Tensor | None, value: Tensor | None = None, owner: Any = None,
        target: str | None = None,
    ) -> None:  # fmt: skip
        """Exchange a parameter or buffer of the module `name` for the part `index` of it, with this value if given.

        `owner`, `target`: where the part goes, if not in its old place.
        """
        old, new = self.twins[name]
        inside, _, leaf = parameter.rpartition(".")
        full = getattr(old.get_submodule(inside), leaf)
        if full is None:
            return
        part = take(full.detach(), index) if value is None else value.to(full.detach())
        owner, target = owner or new, target or leaf
        if isinstance(full, nn.Parameter):
            setattr(owner, target, nn.Parameter(part, requires_grad=full.requires_grad))
            self.parts.setdefault(full, []).append(Slice(full, getattr(owner, target), index))
        else:
            setattr(owner, target, part)

    # ---- heads of attention

    @torch.no_grad()
    def heads(self, inputs: tuple[Tensor, ...]) -> None:
        """Attention without the heads that do not count."""
        names = [name for name in self.layers if kinds.of(self.twins[name][0]).has_heads]
        asked = None
        if names:
            with contextlib.suppress(Untraceable):
                asked = _asked_for_weights(Graph(self.model, inputs))
        for name in names:
            old, known = self.twins[name][0], self.layers[name]
            kind = kinds.of(old)
            alive = kind.live_heads(old)
            if alive is None:
                known["reason"] = "has a bias or zeros among its keys"
            elif not alive.all():
                dead = int((~alive).sum())
                if asked is None or name in asked or old._forward_hooks or old._forward_pre_hooks:
                    why = "torch.fx cannot follow the network" if asked is None else "its weights are used, or hooks"
                    known.update(kept=dead, reason=why)
                    continue
                if dead == len(alive):
                    alive[0] = True
                    known.update(kept=1, reason=LAST)
                self._replace(name, kind.with_heads(old, alive, partial(self.cut, name)))

    def _replace(self, name: str, module: nn.Module) -> None:
        if not name:
            self.model = module
            return
        parent, _, child = name.rpartition(".")
        owner: Any = self.model.get_submodule(parent)
        setattr(owner, child, module)
        kinds.of(owner).part_replaced(owner)

    # ---- units

    @torch.no_grad()
    def units(self, inputs: tuple[Tensor, ...], *, training: bool) -> None:
        """Everything without the units that do not count."""
        try:
            graph = Graph(self.model, inputs)
            nodes = graph.traced().nodes
            plain = sum(node.op == "placeholder" for node in nodes) == len(inputs)
            walk = RemovableChannels(self.model, graph.traced(), rewrite=plain and not training, carry=self.carry)
            moving = self._moving(graph, walk) if training else None
            if moving is not None and len(moving):
                walk = RemovableChannels(self.model, graph.traced(), moving)
        except Untraceable as error:
            self.notes.append(f"No units were removed: {error}")
            for known in self.layers.values():
                known["reason"] = known["reason"] or "torch.fx cannot follow the network"
            return
        for call in walk.calls:
            self._explain(walk, call)
        called = {call.name for call in walk.calls}
        for name, known in self.layers.items():
            if name not in called and not kinds.of(self.twins[name][0]).has_heads and not known["reason"]:
                known["reason"] = "is called in another way than once with one tensor"
        for call in walk.calls:
            self._shorten(walk, call)
        edits = [edit for edit in walk.edits if walk.gone[edit.ids].any()]
        if edits:
            self.code = _rewritten(nodes[0].graph, edits, walk.gone)
            self.notes.append(
                f"Sizes that change (heads, or a view) stand in the code of {type(self.original).__name__}: what comes "
                "out is a torch.fx.GraphModule of it as it computes in eval."
            )

    def _moving(self, graph: Graph, walk: RemovableChannels) -> Tensor | None:
        """Ids whose constants are others in training, where norms take the statistics of the batch."""
        self.model.train()
        without_noise(self.model, norms=False)
        training = RemovableChannels(self.model, graph.traced())
        self.model.eval()
        if training.count != walk.count or len(training.calls) != len(walk.calls):
            return torch.arange(walk.count)
        moving = [torch.empty(0, dtype=torch.int64)]
        for a, b in zip(walk.calls, training.calls, strict=True):
            size = a.source.value.abs().max() if len(a.source.ids) else torch.tensor(0.0)
            same = b.source.constant & ((a.source.value - b.source.value).abs() <= 1e-6 * size)
            moving.append(a.source.ids[a.source.constant & ~same])
        return torch.cat(moving)

    def _explain(self, walk: RemovableChannels, call: Call) -> None:
        """Note how many dead units stay, and why."""
        if call.name not in self.layers:
            return
        kept = call.output.ids[walk.dead(call) & ~walk.gone[call.output.ids]]
        reasons = walk.reason(kept)
        self.layers[call.name].update(kept=len(kept), reason="; ".join(dict.fromkeys(reasons)))

    def _shorten(self, walk: RemovableChannels, call: Call) -> None:
        module: Any = self.twins[call.name][1]
        kind = kinds.of(module)
        gone = walk.gone[call.output.ids]
        outputs = (~gone).nonzero().view(-1) if gone.any() else None
        kept, image = Kept(outputs), None
        if kind.mixes(module):
            _, inputs, weight, shift = walk.fold(call)
            if shift is not None and shift.dim() > 1:
                image, shift = shift.to(module.weight), None
            kept = Kept(outputs, inputs, weight, shift)
        if kept.outputs is None and kept.inputs is None:
            return
        kind.cut(module, kept, partial(self.cut, call.name))
        if image is not None:
            self._replace(call.name, nn.Sequential(module, AddImage(image[None])))

    # ---- ranks

    @torch.no_grad()
    def ranks(self) -> None:
        """W = U V with fewer numbers than W has, where the rank allows it: two layers instead of one."""
        shared = [id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None]
        for name, known in self.layers.items():
            module: Any = self.model.get_submodule(name)
            kind = kinds.of(module)
            if not kind.mixes(module) or module._forward_hooks or module._forward_pre_hooks:
                continue
            if shared.count(id(module.weight)) > 1 or self._by_name(name):
                continue
            weight = kind.matrix(module).flatten(1)
            rank = _rank(weight)
            if not rank or rank * sum(weight.shape) >= int(weight.count_nonzero()):
                continue
            factors = kind.factors(module, rank)
            if factors is not None:
                self._replace(name, _factored(module, weight, *factors))
                known["rank"] = rank

    def _by_name(self, name: str) -> bool:
        """Whether the module around it takes the weights themselves."""
        parent = self.model.get_submodule(name.rpartition(".")[0]) if "." in name else self.model
        return kinds.of(parent).reads_parts


def _rewritten(code: fx.Graph, edits: list[Edit], gone: Tensor) -> fx.Graph:
    """The same operations with other numbers of heads."""
    twins: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    new.output(new.graph_copy(code, twins))
    for edit in edits:
        node, left = twins[edit.node], int((~gone[edit.ids]).sum()) * edit.each
        args: list[Any] = list(node.args)
        if edit.inner is None:
            args[edit.at] = left
        else:
            inner = list(args[edit.at])
            inner[edit.inner] = left
            args[edit.at] = tuple(inner)
        node.args = tuple(args)
    return new


def _sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs), (heads, width) or (columns, rows)."""
    if isinstance(module, nn.Sequential):
        return _sizes(module[-1])[0], _sizes(module[0])[1]
    return kinds.of(module).sizes(module)


def _asked_for_weights(graph: Graph) -> set[str]:
    """The modules of which more than the first result is used."""
    asked = set()
    for node in graph.traced().nodes:
        for user in node.users:
            if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
                asked.add(str(node.target))
    return asked


def _rank(weight: Tensor) -> int | None:
    """How many singular values count; None where there is nothing to gain or nothing finite."""
    if min(weight.shape) < 2 or not bool(weight.isfinite().all()) or not bool(weight.any()):
        return None
    values = torch.linalg.svdvals(weight.double())
    return int((values > SINGULAR * values[0]).sum())


def _factored(module: Any, weight: Tensor, first: Any, second: Any) -> nn.Sequential:
    """Two layers, V and then U with the bias, where UV is the weight of a layer."""
    rank = len(first.weight)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    first.weight.copy_((root[:, None] * v[:rank]).view_as(first.weight))
    second.weight.copy_((u[:, :rank] * root).view_as(second.weight))
    for p in (first.weight, second.weight):
        p.requires_grad_(module.weight.requires_grad)
    if module.bias is not None:
        second.bias = module.bias
    return nn.Sequential(first, second)


def _difference(model: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference of the outputs in eval, relative to the largest output, on the example and random inputs.

    In float64 where the networks can compute in it.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pair = [copy.deepcopy(m).eval() for m in (model, small)]
        trials = [inputs, *([_random(x, generator) for x in inputs] for _ in range(TRIALS))]
        for trial in trials:
            try:
                outputs = [tree_leaves(m.double()(*[_double(x) for x in trial])) for m in pair]
            except (RuntimeError, TypeError):  # a dtype that is written in the code
                pair = [copy.deepcopy(m).eval() for m in (model, small)]
                outputs = [tree_leaves(m(*[x.clone() for x in trial])) for m in pair]
            for a, b in zip(*outputs, strict=True):
                if isinstance(a, Tensor) and a.numel() and a.is_floating_point():
                    scale = float(a.nan_to_num(0, 0, 0).abs().max()) or 1.0
                    same = (a == b) | (a.isnan() & b.isnan())
                    worst = max(worst, float(torch.where(same, 0.0, (a - b).abs()).max()) / scale)
                elif isinstance(a, Tensor) and not torch.equal(a, b):
                    worst = float("inf")
    return worst if worst == worst else float("inf")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x.clone()


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Something of the same shape, dtype and range."""
    if x.is_floating_point():
        scale = float(x.double().square().mean().sqrt()) if x.numel() else 1.0
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).mul_(scale or 1.0).to(x)
    if x.dtype == torch.bool or x.is_complex() or not x.numel():
        return x.clone()
    low, high = int(x.min()), int(x.max())
    return torch.randint(low, high + 1, x.shape, generator=generator).to(x)


# ---- the optimizer


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    levels = getattr(optimizer, "levels", None)
    if levels is not None:
        levels.leave()
    known = {id(p) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in known:
                raise ValueError(
                    f"`optimizer` holds a parameter of shape {tuple(p.shape)} in group {i} that the model does not "
                    "have; expected an optimizer of this model."
                )


def _is_nuclear(optimizer: torch.optim.Optimizer) -> list[bool]:
    return [reg is not None and reg.unit == "rank" for reg in getattr(optimizer, "regularizers", [])]


def _follow(optimizer: torch.optim.Optimizer, model: nn.Module, scissors: _Scissors) -> torch.optim.Optimizer:
    """An optimizer of the same class for the smaller network, with the part of the state that belongs to it."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    same = dict(scissors.model.named_parameters(remove_duplicate=False))
    regularizers = getattr(optimizer, "regularizers", None)
    groups: list[dict[str, Any]] = []
    state: list[tuple[Tensor, Slice | None, dict[str, Any]]] = []
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "regularizer", "param_names")}
        reg = None if regularizers is None else regularizers[i]
        together: list[Tensor] = []
        for p in group["params"]:
            parts = scissors.parts.get(p)
            if parts is None:
                together.append(same[names[id(p)]])
                state.append((together[-1], None, optimizer.state.get(p, {})))
                continue
            for part in parts:
                own = {k: _restrict(v, part) if k in ("lam", "delta") else v for k, v in options.items()}
                state.append((part.small, part, optimizer.state.get(p, {})))
                if reg is None or reg.elementwise:
                    together.append(part.small)
                    continue
                cut = reg.cut(part, optimizer.state.get(p, {}).get("dual"), group["lam"])
                if cut is None:
                    cut = reg
                    scissors.notes.append(f"{reg!r} goes on with what is left of {names[id(p)]}.")
                groups.append({"params": [part.small], **own, "regularizer": cut})
        if together:
            groups.append({"params": together, **options, **({} if regularizers is None else {"regularizer": reg})})
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted and k != "regularizer"}
    new = type(optimizer)(groups, **defaults)
    for small, whole, held in state:
        if held:
            new.state[small] = {k: _restrict(v, whole) for k, v in held.items()}
            if isinstance(optimizer, BregmanOptimizer) and whole is not None:
                _settle(new, small)
    return new


def _restrict(value: Any, part: Slice | None) -> Any:
    """What belongs to the part, of something shaped like its parameter; of others a copy."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if part is None or value.dim() == 0 or value.numel() == 1:
        return value.detach().clone()
    if value.shape != part.full.shape:
        value = value.expand_as(part.full)
    return part.restrict(value)


def _settle(optimizer: Any, p: Tensor) -> None:
    """Let v follow a constant that was folded into its weight."""
    for group, reg in zip(optimizer.param_groups, optimizer.regularizers, strict=True):
        if any(p is q for q in group["params"]) and "dual" in optimizer.state[p]:
            with torch.no_grad():
                optimizer.state[p].pop("written", None)
                optimizer._follow(p, optimizer.state[p], group, reg)
