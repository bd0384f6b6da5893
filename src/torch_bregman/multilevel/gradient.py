"""The gradient of a restricted weight as the weight shows it: as large as the weight, but nothing of that size is made.

`clip_grad_norm_(model.parameters())` and a loop of one's own find it at the weights of the model. What they do to it
in place happens to the gradient of the live part, which the optimizer steps with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..part import Part

_aten = torch.ops.aten
#: done in place to the live entries alone, where all else is a number: entry by entry, and the others are not looked at
_IN_PLACE = frozenset(
    {
        _aten.mul_.Tensor, _aten.mul_.Scalar, _aten.div_.Tensor, _aten.div_.Scalar, _aten.zero_.default,
        _aten.clamp_.default, _aten.clamp_.Tensor, _aten.neg_.default, _aten.nan_to_num_.default,
    }
)  # fmt: skip


class LiveGradient(Tensor):
    """`held` at its `places`, and zeros elsewhere.

    Anything is done to the whole tensor, made for the moment, and what changed of it in place is written to `held`.
    Norms, clipping, scaling and clearing need no such tensor.

    Attributes:
        held: the gradient of the live part, of which this is a view.
        places: where its entries are in the weight.
        shows: what part of the gradient of the weight this is, as a function of it; None for all of it.
    """

    held: Tensor
    places: Part
    shows: Callable[[Tensor], Tensor] | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, held: Tensor, places: Part, shows: Callable[[Tensor], Tensor] | None = None, like: Tensor | None = None
    ) -> LiveGradient:
        shape, strides = (places.full_shape, None) if like is None else (like.shape, like.stride())
        made: LiveGradient = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=held.dtype, device=held.device
        )
        made.held, made.places, made.shows = held, places, shows
        return made

    def whole(self) -> Tensor:
        """The gradient of all of the weight, as an ordinary tensor."""
        full = self.held.new_zeros(self.places.full_shape)
        self.places.prolong(self.held, full)
        return full

    def dense(self) -> Tensor:
        """The same as an ordinary tensor."""
        return self.whole() if self.shows is None else self.shows(self.whole())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, cls):
            if func is _aten.detach.default:
                return cls(self.held, self.places, self.shows, None if self.shows is None else self)
            others = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)]
            if self.shows is None and not any(x.dim() or isinstance(x, cls) for x in others):
                if func in _IN_PLACE:
                    func(self.held, *args[1:], **kwargs)
                    return self
                if func is _aten.linalg_vector_norm.default and _of_all(*args[1:], **kwargs):
                    return func(self.held, *args[1:], **kwargs)
        return _as_a_whole(func, args, kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return self.dense().__repr__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, data: Tensor) -> None:
        self.copy_(data)

    def numpy(self, **kwargs: Any) -> Any:
        return self.dense().numpy(**kwargs)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().__deepcopy__(memo)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.dense().__reduce_ex__(proto)  # type: ignore[no-untyped-call]


def _of_all(order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> bool:
    """Whether a norm with these arguments is one of all entries, to which zeros add nothing."""
    return order >= 0 and dim is None and not keepdim


def _as_a_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Do it to the whole gradients, and let the live entries follow."""
    if func.namespace == "c10d":
        raise RuntimeError(
            "`grad` of a weight that Multilevel restricts cannot be sent to other ranks; send those of "
            "[p for group in optimizer.param_groups for p in group['params']], or give Multilevel the "
            "DistributedDataParallel, which averages them."
        )
    wholes: dict[int, tuple[LiveGradient, Tensor]] = {}  # by what they show: there may be several views of it

    def plain(x: Any) -> Any:
        if not isinstance(x, LiveGradient):
            return x
        _, whole = wholes.setdefault(id(x.held), (x, x.whole()))
        return whole if x.shows is None else x.shows(whole)

    plain_args, plain_kwargs = tree_map(plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    schema = func._schema
    if schema.is_mutable:
        for shown, whole in wholes.values():
            shown.held.copy_(shown.places.restrict(whole))
        same = zip(tree_leaves((plain_args, plain_kwargs)), tree_leaves((args, kwargs)), strict=True)
        given = {id(after): before for after, before in same if isinstance(before, Tensor)}
        return tree_map(lambda x: given.get(id(x), x), result)
    if len(wholes) == 1 and any(r.alias_info is not None for r in schema.returns):
        ((shown, _),) = wholes.values()
        return _views(func, args, kwargs, shown, result)
    return result


def _views(func: Any, args: Any, kwargs: Any, shown: LiveGradient, result: Any) -> Any:
    """What shows a part of a gradient shows it also to who writes there."""

    def of(whole: Tensor) -> Any:
        def see(x: Any) -> Any:
            return x if not isinstance(x, LiveGradient) else whole if x.shows is None else x.shows(whole)

        seen_args, seen_kwargs = tree_map(see, (args, kwargs))
        return func(*seen_args, **seen_kwargs)

    if isinstance(result, Tensor):
        return LiveGradient(shown.held, shown.places, of, result)
    return [
        LiveGradient(shown.held, shown.places, lambda whole, i=i: of(whole)[i], part)  # type: ignore[misc]
        for i, part in enumerate(result)
    ]
