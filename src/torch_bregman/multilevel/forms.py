"""How a kind of layer computes with the live entries of its weight alone: Linear and Conv2d can, on a CPU.

A form is found as `kinds.of(module).sparse`. One for a kind of your own is a subclass of `SparseForm`, set there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..network import kinds
from ..part import Part
from .conv import ConvPattern, sparse_conv2d
from .linear import Pattern, sparse_linear
from .restricted import class_of


class SparseForm:
    """The sparse form of a kind of layer.

    Attributes:
        adds_whole: whether it can also make the gradient of the whole weight, on the way back.
        fuses_relu: whether it can do a ReLU that follows in the same pass.
    """

    adds_whole = False
    fuses_relu = False

    def __init__(self, kind: kinds.Kind) -> None:
        self.kind, self.name = kind, kind.module_class.__name__

    def takes(self, module: Any) -> bool:
        """Whether it can do what this module does."""
        return True

    def pattern(self, weight: Tensor, index: Tensor | None = None) -> Part:
        """The live entries of a weight, or those of this `index`, ready to be computed with."""
        raise NotImplementedError

    def compute(
        self, module: Any, x: Tensor, values: Tensor, pattern: Any, *, whole: nn.Parameter | None = None,
        near: Any = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        """What the module makes of `x` with `values` on `pattern`, zeros elsewhere.

        `whole`: the weight, where the gradient of all of it is wanted. `near`: further entries whose gradient is
        wanted. `relu`: follow with a ReLU.
        """
        raise NotImplementedError

    def dense(self, module: Any, x: Tensor, weight: Tensor) -> Tensor:
        """What the module makes of `x` with another weight."""
        return self.kind.dense(module, x, weight, module.bias)


class LinearForm(SparseForm):
    adds_whole = True
    fuses_relu = True

    def pattern(self, weight: Tensor, index: Tensor | None = None) -> Part:
        return Pattern(weight, index)

    def compute(
        self, module: Any, x: Tensor, values: Tensor, pattern: Any, *, whole: nn.Parameter | None = None,
        near: Any = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        flat = x if x.dim() == 2 else x.flatten(0, -2)
        y = sparse_linear(flat, values, module.bias, pattern, whole=whole, near=near, relu=relu)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


class ConvForm(SparseForm):
    def takes(self, module: Any) -> bool:
        """Zeros around the image, on both sides alike."""
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        even = module.padding != "same" or all(d * (k - 1) % 2 == 0 for d, k in sizes)
        return module.padding_mode == "zeros" and even

    def pattern(self, weight: Tensor, index: Tensor | None = None) -> Part:
        return ConvPattern(weight, index)

    def compute(
        self, module: Any, x: Tensor, values: Tensor, pattern: Any, *, whole: nn.Parameter | None = None,
        near: Any = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        where = (module.stride, module.padding, module.dilation, module.groups)
        return sparse_conv2d(x, values, module.bias, pattern, *where, near=near)


for _form, _module_class in ((LinearForm, nn.Linear), (ConvForm, nn.Conv2d)):
    _kind = kinds.REGISTRY[_module_class]
    _kind.sparse = _form(_kind)


def form_of(module: nn.Module) -> SparseForm | None:
    """The sparse form of a module that computes as its kind does; None where there is none."""
    form: SparseForm | None = kinds.of(module).sparse
    if form is None or "forward" in module.__dict__:
        return None
    return form if class_of(module._parameters.get("weight")) is nn.Parameter and form.takes(module) else None
