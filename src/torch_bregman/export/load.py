"""`load_sparse`: the values of a sparse file into a network, whose layers become the smaller ones of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import require_whole
from ..network import kinds
from ..network.wrapped import bare, inwards
from . import descriptions
from .descriptions import Place, describe, places, short
from .file import COMPLEX, Pathlike, identity, integers, is_graph, slots_of, tensors_in, tensors_of, too_large
from .patterns import Array
from .read import SparseFile, read_file, some

FROM_MODEL = ("eps", "momentum", "max_norm", "norm_type", "dropout")  # which no file holds


@torch.no_grad()
def load_sparse(model: nn.Module, path: Pathlike) -> nn.Module:
    """Load what `save_sparse` wrote into `model`, in place; nothing in the file is run.

    `model` is the network that was saved or a fresh one of the same architecture; what torch.compile, data parallelism
    or averaging put around it or around the saved one plays no part. Values are copied into its tensors:
    their storage, device and dtype stay (a bfloat16 file loads into a float32 network). Where the file holds a smaller
    layer of a known kind in the place of one of the model's, as `tb.shrink` leaves them, the layer is replaced by a
    fresh one on the same device, with the same dtype, mode and `requires_grad`; build the optimizer afterwards.

    Everything is checked before anything is written. Memory: the file and one dense tensor at a time.

    Returns:
        `model`.

    Raises:
        ValueError: the file is damaged, is none of ours, was written by a newer version, or does not fit the model,
            which is as it was then; or `model` holds what no sparse file can, see `save_sparse`.
        OSError: there is no such file.
    """
    inner = bare(model)
    require_whole(inner, "tb.load_sparse")
    tensors = tensors_of(inner)
    # Larger files than this hold another network.
    file = read_file(Path(path), (1 << 30) + sum(16 * tensor.numel() for tensor in tensors.values())).inside(tensors)
    positions = {name: file.where(name) for name in file.tensors}
    standing = dict(places(inner))
    try:
        replaced, larger = _replacements(file, inner, standing)
        slots = {name: slot for p, module in replaced.items() for name, slot in slots_of(module, f"{p}.").items()}
        stay = {name: t for name, t in tensors.items() if not any(name.startswith(f"{p}.") for p in replaced)}
        _check_fit(file, stay | tensors_in(slots), larger)
        if replaced and any(isinstance(wrapper, DistributedDataParallel) for wrapper in inwards(model)):
            raise ValueError(
                f"{some(list(replaced))} is smaller in the file, and DistributedDataParallel keeps the layers that it "
                "was made with; load into the network before it is wrapped"
            )
        _check_values(file, stay | tensors_in(slots), positions)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}.") from None

    _materialise(replaced, standing, next(iter(tensors.values()), None))
    targets = stay | tensors_in(slots)
    groups: dict[str, list[str]] = {name: [name] for name in file.tensors}
    for name, target in file.same.items():
        groups[target].append(name)
    for stored, names in groups.items():
        one = targets[next((name for name in names if name in stay), names[0])]
        for name in names:
            if name in slots and isinstance(targets[name], nn.Parameter) == isinstance(one, nn.Parameter):
                holder, leaf = slots[name]
                holder[leaf] = targets[name] = one  # tied as in the file
        value = file.tensors[stored].expand(positions.pop(stored))
        for tensor in {identity(targets[name]): targets[name] for name in names}.values():
            tensor.copy_(torch.view_as_complex(value) if stored in file.complex else value)
    for at, module in replaced.items():
        standing[at].parent._modules[standing[at].leaf] = module
    return model


def _replacements(
    file: SparseFile, model: nn.Module, standing: Mapping[str, Place]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules of the model that are of another kind or size in the file, built without memory, by path.

    Also the paths of those that are too large in the file to be put into the model. A module without tensors may be
    missing in the model; the tensors of any other will be missed by name.
    """
    if file.header.get("graph") and not is_graph(model):
        raise ValueError(
            "it holds a torch.fx.GraphModule, for sizes in the code of the network had to change; load it into the "
            "model that tb.shrink returns, or export that model with save_program"
        )
    found: dict[str, nn.Module] = {}
    larger: list[str] = []
    done: set[str] = set()  # with everything below
    shared: dict[tuple[int, str], nn.Module] = {}  # one module in several places stays one
    for path in sorted(file.modules.keys() & standing.keys(), key=lambda path: (path.count("."), path)):
        old = standing[path].module
        above = any(path[:i] in done for i, letter in enumerate(path) if letter == ".")
        if above or describe(old) == file.modules[path]:
            continue
        done.add(path)
        key = (id(old), json.dumps(file.modules[path]))
        new = shared[key] = shared[key] if key in shared else descriptions.build(path, file.modules)
        if describe(old) is None and _shapes(old) == _shapes(new):
            continue  # a module of the user's own, which holds the same tensors
        if _is_smaller(new, old):
            found[path] = new
        else:
            larger.append(path)
    if found and is_graph(model):
        raise ValueError(f"{some(list(found))} is another in the file, and a GraphModule keeps its own")
    return found, larger


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors_in(slots_of(module)).items()}


def _is_smaller(new: nn.Module, old: nn.Module) -> bool:
    """Whether `new` takes no more memory than `old`, up to four biases (an attention's) as long as its longest side."""

    def size(module: nn.Module, biases: bool) -> int:
        tensors = {id(t): (n, t) for n, t in [*module.named_parameters(), *module.named_buffers()]}.values()
        return sum(t.numel() for n, t in tensors if n.endswith("bias") == biases)

    longest = max((side for t in [*old.parameters(), *old.buffers()] for side in t.shape), default=0)
    return size(new, False) <= size(old, False) and size(new, True) <= max(size(old, True), 4 * longest)


def _check_fit(file: SparseFile, targets: Mapping[str, Tensor], larger: list[str]) -> None:
    """ValueError unless names, shapes and kinds of numbers agree."""
    names = {*file.tensors, *file.same}
    faults, shapes = [], []
    if missing := sorted(targets.keys() - names):
        faults.append(f"it lacks {some(missing)}")
    if unexpected := sorted(names - targets.keys()):
        faults.append(f"the model lacks {some(unexpected)}")
    for name in sorted(targets.keys() & names):
        source, target = file.same.get(name, name), targets[name]
        shape, dtype = file.tensors[source].shape, file.tensors[source].values.dtype
        if source in file.complex:
            shape, dtype = shape[:-1], COMPLEX[dtype]
        if shape != tuple(target.shape):
            shapes.append(f"{short(name)} is {short(shape)} in the file and {tuple(target.shape)} in the model")
        elif dtype != target.dtype and not (dtype.is_floating_point and target.is_floating_point()):
            faults.append(f"{short(name)} is {dtype} in the file and {target.dtype} in the model")
        elif any(step == 0 and side > 1 for step, side in zip(target.stride(), target.shape, strict=True)):
            faults.append(f"{short(name)} of the model is an expanded tensor and cannot be written")
        elif target.is_inference() and not torch.is_inference_mode_enabled():
            faults.append(f"{short(name)} of the model was made in inference mode and cannot be written")
    faults += [*shapes[:3], f"and {len(shapes) - 3:,} more"] if len(shapes) > 3 else shapes
    if larger:
        faults.append(f"{some(larger)} is larger in the file, and a layer is only replaced by a smaller one")
    if faults:
        raise ValueError("; ".join(faults))


def _check_values(
    file: SparseFile, targets: Mapping[str, Tensor], positions: Mapping[str, tuple[Array, Array] | None]
) -> None:
    """ValueError if a value becomes infinite in the model, or one tensor of the model would get two contents."""
    first: dict[tuple[Any, ...], str] = {}
    for name, target in targets.items():
        source = file.same.get(name, name)
        values = file.tensors[source].values
        if target.is_floating_point() and values.dtype != target.dtype and (fault := too_large(values, target.dtype)):
            raise ValueError(f"{name} {fault}")
        other = first.setdefault(identity(target), source)
        if other != source:
            one, two = (integers(file.tensors[key].expand(positions[key])) for key in (other, source))
            if not np.array_equal(one, two):
                raise ValueError(f"{short(other)} and {short(source)} are one tensor in the model and two in the file")


def _materialise(replaced: Mapping[str, nn.Module], standing: Mapping[str, Place], example: Tensor | None) -> None:
    """Give the new modules memory, on the device and with the dtype, mode and `requires_grad` of the old ones."""
    for module, old in {id(m): (m, standing[path].module) for path, m in replaced.items()}.values():
        like = next((t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point()), example)
        if like is not None:
            module.to(like.dtype if like.is_floating_point() else None).to_empty(device=like.device)
        flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags.get(name, any(flags.values())))
        if type(old) is type(module) or kinds.of(old).has_heads:
            for name in FROM_MODEL:
                if hasattr(old, name):
                    setattr(module, name, getattr(old, name))
        module.train(old.training)
