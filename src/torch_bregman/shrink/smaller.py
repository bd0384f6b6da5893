"""The network without what does not count: the same function in smaller stock modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..distributed import require_whole
from ..network.tracer import STEPPED
from ..network.wrapped import DENSER, bare, is_average
from ..optim.unwrapped import unwrapped
from ..part import Piece
from ..text import Shown, Table
from .check import difference
from .copy import ShrinkingCopy
from .heads import remove_heads
from .optimizer import check_optimizer, follow
from .ranks import split_ranks
from .report import Report
from .units import remove_units

TOLERANCE = 1e-5  # of the largest output; in float64, so what is left is the rounding of folded constants


@dataclass(frozen=True, repr=False)
class Shrunk(Shown):
    """What `shrink` returns; prints as its report.

    Attributes:
        model: the smaller network.
        optimizer: one that goes on with it, or None.
        report: what was done.
        parts: which part of which parameter of the original each one of the smaller network is that was cut, as
            `Piece` with `full`, `small` and `index`. Constants may have been added to its values.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    report: Report
    parts: list[Piece]

    def shown(self) -> Sequence[Table | str]:
        return self.report.shown()

    def to_dict(self) -> dict[str, float | str]:
        return self.report.to_dict()


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
        model: the network; what torch.compile, data parallelism or averaging put around it is taken off. torch.fx has
            to be able to follow it; if it cannot, only attention heads and ranks shrink.
        example_inputs: what its forward takes, in order. Spatial sizes are those of all later inputs, the batch size
            need not be.
        optimizer: of `model`. A new one of the same class is made for the smaller network, with the state cut along:
            its next step gives the same weights on what was kept. Units whose constant is another one in training,
            where a norm takes the statistics of the batch, stay then, and no layer becomes two.

    Raises:
        TypeError: `example_inputs` are no tensors.
        ValueError: `optimizer` holds parameters that the model does not have, or `model` holds DTensors, or tensors
            that are computed from others: by parametrizations, pruning, or by hand.
        RuntimeError: the outputs are not the same; then it is an error of this function.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"`example_inputs` is {type(example_inputs).__name__} {example_inputs!r:.80}; expected tensors."
        )
    averaged, model = is_average(model), bare(model)
    require_whole(model, "tb.shrink")
    optimizer = unwrapped(optimizer)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    if isinstance(model, STEPPED) and len(inputs) == 1:
        whole = shrink(nn.Sequential(model), inputs, optimizer)
        rows = [replace(row, name=row.name.partition(".")[2]) for row in whole.report.rows]
        return Shrunk(whole.model.get_submodule("0"), whole.optimizer, replace(whole.report, rows=rows), whole.parts)
    smaller = ShrinkingCopy(model)
    remove_units(smaller, inputs, training=optimizer is not None)
    remove_heads(smaller, inputs)
    if optimizer is None:
        split_ranks(smaller)
    elif any(reg is not None and reg.unit == "rank" for reg in getattr(optimizer, "regularizers", [])):
        smaller.notes.append("No layer became two factors: the state of the optimizer does not split like that.")
    if averaged:
        smaller.notes.append(DENSER)
    rows = smaller.rows()
    smaller.finish()
    off = _difference(smaller, inputs)
    following = None if optimizer is None else follow(optimizer, model, smaller)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller.model))
    report = Report(rows, (before, after), off, smaller.notes)
    return Shrunk(smaller.model, following, report, [part for parts in smaller.parts.values() for part in parts])


def _difference(smaller: ShrinkingCopy, inputs: tuple[Tensor, ...]) -> float:
    """Of the outputs. A network whose own code computes with the sizes of its layers becomes what was traced of it."""
    reason = ""
    while True:
        try:
            off = difference(smaller.original, smaller.model, inputs)
        except Exception as error:  # whatever its own code raises
            off, reason = torch.inf, f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        if off <= TOLERANCE:
            return off
        if smaller.code is not None or smaller.traced is None:
            raise RuntimeError(
                f"The smaller network differs by {off:.1e} of the largest output, more than {TOLERANCE:.0e}{reason}; "
                "nothing was changed. Please report this network."
            )
        smaller.rewrite(smaller.traced())
        smaller.notes.append(
            f"The code of {type(smaller.original).__name__} computes with the sizes of its layers: what comes out is a "
            "torch.fx.GraphModule of it as it computes in eval."
        )


def compact(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """`shrink` for inference alone: constants that depend on the position are added as an image, so none is carried."""
    smaller = ShrinkingCopy(model)
    remove_units(smaller, inputs, carry=False)
    remove_heads(smaller, inputs)
    split_ranks(smaller)
    smaller.finish()
    return smaller.model
