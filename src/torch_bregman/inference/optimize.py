"""`optimize_for_inference`: every layer dense or sparse, whichever measured faster, and chains of layers in one call.

A chain (Linear or Conv2d, its activation and pooling, the next Linear …) whose layers all measured faster sparse
becomes a `Chain`: tables of its live weights, and one call of a compiled loop for the whole of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..compare import close
from ..distributed import require_whole
from ..network.copied import copied
from ..network.wrapped import bare
from ..shrink import compact
from . import choice
from .attention import split
from .chain import Chain
from .links import Unfit
from .plain import plain
from .report import InferenceReport
from .sites import TOLERANCE, Traced, Untraced


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
    model = bare(model)
    require_whole(model, "tb.optimize_for_inference")
    with torch.no_grad():
        dense = copied(model).eval().requires_grad_(False)
        try:
            wanted = dense(*example_inputs)
        except Exception as error:
            raise ValueError(
                f"`example_inputs` do not fit: {type(model).__name__} raised {type(error).__name__}: {error}"
            ) from error
        return _optimized(dense, example_inputs, wanted)


@dataclass
class _Prepared:
    """The network as it is before any layer is sparse.

    Attributes:
        plan: where its layers are.
        folded: norms that went into the layer before them.
        removed: whether units that do nothing are gone.
        parameters: that it has then.
    """

    plan: Traced | Untraced
    folded: int
    removed: bool
    parameters: int


def _prepare(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any, notes: list[str]) -> _Prepared:
    try:
        traced = plan = Traced(dense, inputs)
        small = _compact(traced.module, inputs, notes)  # with the norms folded a dead unit has no shift of its own
        removed = _size(small) != _size(traced.module)
        parts = split(small if removed else traced.module)
        if parts is not traced.module:
            plan = Traced(parts, inputs)
        for found in (traced, plan):
            if not close(found.module(*inputs), wanted, TOLERANCE):
                raise RuntimeError("the trace computes something else")
        return _Prepared(plan, traced.folded, removed, _size(small))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        notes.append(f"torch.fx cannot trace the network ({lines[0]}): layers one by one, no BatchNorm folded.")
        small = _compact(dense, inputs, notes)
        parts = split(copy.deepcopy(small))
        if not close(parts(*inputs), wanted, TOLERANCE):
            parts = copy.deepcopy(small)
        return _Prepared(Untraced(parts, inputs), 0, _size(small) != _size(dense), _size(small))


def _optimized(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> InferenceModule:
    notes: list[str] = []
    prepared = _prepare(_in_stock_layers(dense, inputs, wanted), inputs, wanted, notes)
    plan = prepared.plan
    networks = _dense_networks(dense, prepared)
    reason, fastest = _reason(inputs), choice.fastest_chains()
    choices = [choice.choose(site, reason, fastest) for site in plan.sites]
    chosen = [of.chosen == "sparse" for of in choices]
    able = [of.sparse is not None for of in choices]
    plans = {"sparse where each layer alone was faster": chosen, "sparse wherever it can be": able}
    for name, which in plans.items():
        if any(which) and not (which is able and able == chosen):
            try:
                networks[name] = plan.build(which, fastest)
            except Unfit as error:
                notes.append(f"{name}: {error}.")
    _drop_wrong(networks, inputs, wanted, notes)
    seconds = choice.seconds_of_networks(networks, inputs)
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > choice.FASTER_BELOW * seconds["dense"]:
        best = "dense"
        notes.append("Nothing was faster than the dense network, so the result is the dense network.")
    if prepared.removed and best != "dense":
        notes.append(
            f"Units that do nothing removed: {_size(dense):,} parameters before, {prepared.parameters:,} after."
        )
    if prepared.folded and best != "dense":
        notes.append(f"BatchNorm folded into the layer before it: {prepared.folded}.")
    chains = [m for m in networks[best].modules() if isinstance(m, Chain)]
    if ways := sorted({m.way if m.spread else f"{m.way} on one thread" for m in chains}):
        notes.append(f"Chains go through {' and '.join(ways)}.")
    chosen = plans.get(best, [False] * len(choices))
    layers = tuple(choice.settled(of, sparse) for of, sparse in zip(choices, chosen, strict=True))
    layers += tuple(choice.left_out(dense, plan.sites))
    batch = next(len(x) if x.dim() else 1 for x in inputs if isinstance(x, Tensor))
    report = InferenceReport(
        layers, batch, torch.get_num_threads(), seconds["dense"], seconds[best], best, tuple(notes)
    )
    return InferenceModule(networks[best], report)


def _in_stock_layers(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> nn.Module:
    """The network in stock layers; as it is where it asks for its own."""
    stock = plain(dense)
    try:
        return stock if close(stock(*inputs), wanted, TOLERANCE) else dense
    except Exception:
        return dense


def _dense_networks(dense: nn.Module, prepared: _Prepared) -> dict[str, nn.Module]:
    """The ways to compute without a sparse layer, by name."""
    networks: dict[str, nn.Module] = {"dense": dense}
    module = prepared.plan.module
    if prepared.folded or prepared.removed:
        networks["dense, simplified"] = module
    if any(isinstance(m, nn.Conv2d) for m in module.modules()):
        channels_last: Any = {"memory_format": torch.channels_last}
        networks["dense, channels last"] = copy.deepcopy(module).to(**channels_last)
    return networks


def _drop_wrong(networks: dict[str, nn.Module], inputs: tuple[Any, ...], wanted: Any, notes: list[str]) -> None:
    """Take out, with a note, the networks whose outputs are not those of the first, the dense one."""
    for name in list(networks)[1:]:
        try:
            right = close(networks[name](*inputs), wanted, TOLERANCE)
        except Exception:  # a network that looks into its own layers finds something else there
            right = False
        if not right:
            del networks[name]
            notes.append(f"{name}: the outputs are not those of the dense network, so it is not used.")


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
