"""`prove`: accuracy, size and speed of a sparse network and of its dense twin, all measured in one run."""

from __future__ import annotations

import copy
import functools
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compare import difference
from ..density import density
from ..export.file import tensors_of
from ..export.formats import as_inputs, rows_of
from ..export.save import save_sparse
from ..inference import optimize_for_inference
from ..layers import weight_layers
from ..network.copied import copied
from ..network.wrapped import DENSER, bare, is_average
from ..shrink import shrink
from .contenders import Maker, compiled, in_onnxruntime
from .figures import COMPILED, DENSE, ONNX, SPARSE, SPARSE_ONNX, Units
from .latency import latencies
from .sheet import Proof
from .sizes import facts

ROUNDS = 30
NO_TWIN = "there is no dense twin: size and speed are those of the same network with random weights"

Score = float | Callable[[nn.Module], float]


def prove(
    dense: nn.Module | None,
    sparse: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    accuracy: Mapping[str, Score] | Callable[[nn.Module], float] | None = None,
    measure: str = "accuracy",
    rounds: int = ROUNDS,
    batches: Sequence[int] = (1, 64),
    rivals: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Compare a sparse network with a dense one on the CPU of this machine.

    The sparse network is shrunk, and what is left of it made fast with `optimize_for_inference`, for each batch size.
    Latencies are paired: in every round each contender is called for 10 ms, in random order, on the same inputs, and
    ratios are taken within a round. Each has one thread or as many as torch has now, whichever it is faster with.
    Neither network is changed.

    Args:
        dense: the dense twin; what torch.compile, data parallelism or averaging put around it or around `sparse` is
            taken off. None for the architecture of `sparse` with random weights in place of the
            zeros, which has the size and the speed of a twin, and no accuracy.
        sparse: the network as it was trained, with exact zeros.
        example_inputs: a tensor, or a tuple of the tensors that the networks are called with.
        accuracy: a function of a network, called on all of them, or such functions or known values by name: "dense",
            "sparse", "shrunk", "optimized".
        measure: what `accuracy` is called; of one whose name ends in "loss", less is better.
        rounds: of the latencies.
        batches: batch sizes of the latencies. Memory is that at the largest.
        rivals: also torch.compile and ONNX Runtime, which take some 20 seconds to get ready. One that cannot be had
            here is listed with the reason.
        progress: called with a few words on what is measured next.

    Returns:
        The sheet; `print` it, or `write` it as JSON.

    Raises:
        ValueError: an argument of the wrong kind, or `sparse` cannot be called on the inputs.
    """
    inputs, batches = as_inputs(example_inputs), _checked(rounds, batches)
    say = progress or (lambda _: None)
    averaged = is_average(sparse)
    sparse = copied(bare(sparse)).cpu().eval()
    twin = dense is not None
    dense = copied(bare(dense)).cpu().eval() if dense is not None else random_weights(sparse)
    tensors_of(dense, "dense")  # what else it held would be counted nowhere
    machine = _machine()
    say("shrinking")
    largest = rows_of(inputs, max(batches))
    small = shrink(sparse, inputs)
    say("choosing the fastest products")
    best = optimize_for_inference(small.model, largest).eval()
    say("size")
    with tempfile.TemporaryDirectory() as folder:
        saved = save_sparse(small.model, Path(folder) / "sparse.safetensors")
    off = _difference(best, sparse, largest)
    sizes = facts(dense, sparse, small.model, best, inputs, max(batches), saved.bytes)
    networks = {"dense": dense, "sparse": sparse, "shrunk": small.model, "optimized": best}
    makers = _contenders(dense, small.model, best, inputs, largest)
    if not rivals:
        makers = {name: makers[name] for name in (DENSE, SPARSE)}
    return Proof(
        measure=measure,
        accuracy=_scores(networks, accuracy, twin, lambda name: say(f"{measure}, {name}")),
        density=density(sparse),
        difference=off if off < 1e300 else 1e300,  # JSON has no infinity
        facts=sizes,
        latencies=tuple(latencies(makers, {batch: rows_of(inputs, batch) for batch in batches}, rounds, say)),
        units=tuple(Units(r.name, r.kind, r.before, r.after, str(r.reason or "")) for r in small.report.rows),
        machine=machine,
        notes=(*([] if twin else [NO_TWIN]), *([DENSER] if averaged else [])),
    )


def _scores(
    networks: Mapping[str, nn.Module],
    accuracy: Mapping[str, Score] | Callable[[nn.Module], float] | None,
    twin: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """What is known or can be measured of each network; of a dense one that is no twin nothing is measured."""
    scores: dict[str, float] = {}
    for name, network in networks.items():
        score = accuracy.get(name) if isinstance(accuracy, Mapping) else accuracy
        if callable(score):
            if name == "dense" and not twin:
                continue
            say(name)
            score = score(network)
        if score is not None and math.isfinite(score):
            scores[name] = float(score)
    return scores


@torch.no_grad()
def _difference(best: nn.Module, sparse: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest one between outputs of the two, relative to the largest output."""
    pairs = zip(tree_leaves(best(*inputs)), tree_leaves(sparse(*inputs)), strict=True)
    return max((difference(a, b) for a, b in pairs if isinstance(b, Tensor)), default=0.0)


def _contenders(
    dense: nn.Module, small: nn.Module, best: nn.Module, inputs: tuple[Tensor, ...], largest: tuple[Tensor, ...]
) -> dict[str, Maker]:
    """By name. `best` is the optimized network for the `largest` inputs and the threads that torch has now."""
    threads = torch.get_num_threads()

    def fast(x: tuple[Tensor, ...]) -> nn.Module:
        if torch.get_num_threads() == threads and [t.shape for t in x] == [t.shape for t in largest]:
            return best
        return optimize_for_inference(small, x)

    return {
        DENSE: lambda x: functools.partial(dense, *x),
        COMPILED: compiled(dense),
        ONNX: in_onnxruntime(dense, inputs),
        SPARSE: lambda x: functools.partial(fast(x), *x),
        SPARSE_ONNX: in_onnxruntime(small, inputs),
    }


def _checked(rounds: int, batches: Sequence[int]) -> tuple[int, ...]:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"Invalid `rounds`: {rounds!r}; expected a whole number of at least 1.")
    sizes = tuple(batches)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise ValueError(f"Invalid `batches`: {batches!r}; expected batch sizes of at least 1.")
    return tuple(dict.fromkeys(sizes))


def random_weights(sparse: nn.Module) -> nn.Module:
    """The same network with random Linear and Conv weights, none of them zero."""
    dense, generator = copy.deepcopy(sparse), torch.Generator().manual_seed(0)
    for layer in weight_layers(dense):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.fan_in**-0.5)
    return dense


def _machine() -> str:
    """Processor, threads and versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:  # only Linux has it
        pass
    parts = [f"{name}, {os.cpu_count()} cores", f"torch {torch.__version__}"]
    try:
        import onnxruntime

        parts.append(f"onnxruntime {onnxruntime.__version__}")
    except ImportError:
        pass
    with suppress(AttributeError, OSError):  # Windows has none
        parts.append(f"load average before {os.getloadavg()[0]:.2f}")
    return "; ".join(parts)
