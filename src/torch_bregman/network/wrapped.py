"""What stands around a network and is none of it: torch.compile, data parallelism, averages of weights."""

from __future__ import annotations

from torch import nn

#: classes that call the network in this attribute; by name, so that nothing is imported for them
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "lightning.fabric.wrappers._FabricModule": "module",
    "lightning_fabric.wrappers._FabricModule": "module",
}
#: those of them whose weights are averages
_AVERAGES = ("AveragedModel", "ModelEmaV2", "ModelEmaV3")
DENSER = (
    "The weights are averages over steps: before tb.prune_(model, density) they are several times as dense as the "
    "network that was trained, and after it norms want to see data, torch.optim.swa_utils.update_bn(loader, model)."
)


def inwards(model: nn.Module) -> list[nn.Module]:
    """The wrappers that torch and well-known trainers put around a network, outermost first, and the network last.

    A class of the user's own is a network, whatever its attributes are called.
    """
    found = [model]
    while (attribute := _attribute(found[-1])) is not None:
        found.append(getattr(found[-1], attribute))
    return found


def bare(model: nn.Module) -> nn.Module:
    """The network inside all wrappers; `model` itself where it has none."""
    return inwards(model)[-1]


def is_average(model: nn.Module) -> bool:
    """Whether its weights are averages over steps, such as those of `torch.optim.swa_utils.AveragedModel`."""
    return any(cls.__name__ in _AVERAGES for wrapper in inwards(model)[:-1] for cls in type(wrapper).__mro__)


def _attribute(module: object) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
