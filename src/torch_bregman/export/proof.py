"""The proof sheet: a sparse network beside its dense twin, in accuracy, size and speed, all measured in one run.

Where the sparse network loses, the sheet says so, and where a rival could not be measured, why.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import platform
import statistics
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compare import difference
from ..density import density
from ..files import write_atomically
from ..layers import forward_flops, weight_layers
from ..text import table
from ..timing import race, without_collection
from .formats import as_inputs, names_of, reason, rows_of, save_onnx, silence

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Fact", "Latency", "Line", "Proof", "Units", "prove"]

BLOCK = 0.01  # seconds of calls in a row of one contender in one round
ROUNDS = 30
EQUAL = 0.05  # two figures that differ by less are about equal
SAME = 1e-4  # outputs that differ by less, of the largest one, are the same within rounding

DENSE, COMPILED, ONNX = "dense, PyTorch", "dense, torch.compile", "dense, ONNX Runtime"
SPARSE, SPARSE_ONNX = "sparse, optimized", "sparse, ONNX Runtime"

Score = float | Callable[[nn.Module], float]
Call = Callable[[], object]
Maker = Callable[
    [tuple[Tensor, ...]], Call
]  # of the call of a contender on these inputs, for torch's number of threads


@dataclass(frozen=True)
class Fact:
    """A figure of both networks of which less is better. `unit`: "", "FLOP" or "B"; `how`: what was counted."""

    name: str
    dense: float
    sparse: float
    unit: str
    how: str


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, the median and the 95th percentile, with the number of `threads` that was the faster one.

    `ratio`: its time over that of the sparse, optimized network, the median over the rounds: above 1, sparse is faster.
    `missing`: why there are no figures.
    """

    contender: str
    batch: int
    threads: int | None = None
    p50: float | None = None
    p95: float | None = None
    ratio: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Units:
    """(outputs, inputs) of a layer before and after shrinking, and why no more could go."""

    layer: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int]
    reason: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table. `good`: whether the sparse network wins in it, None where neither does."""

    cells: tuple[str, ...]
    good: bool | None = None


@dataclass(frozen=True)
class Proof:
    """What `prove` found; prints as tables, and `write` and `read` keep it as JSON.

    Attributes:
        measure: what `accuracy` holds, such as "test accuracy"; of a loss, a name that ends in "loss", less is better.
        accuracy: of "dense" and "sparse" as trained, and of the sparse network once it is "shrunk" and "optimized".
        density: share of the Linear and Conv weights of the sparse network that are not zero.
        difference: the largest difference between outputs of the optimized and of the trained network, relative to the
            largest output.
        facts: parameters, FLOPs, bytes, memory.
        latencies: of every contender at every batch size.
        units: outputs and inputs of the layers before and after shrinking.
        machine: what it was measured on.
        notes: what has to be known beside the figures.
    """

    measure: str
    accuracy: dict[str, float]
    density: float
    difference: float
    facts: tuple[Fact, ...]
    latencies: tuple[Latency, ...]
    units: tuple[Units, ...]
    machine: str
    notes: tuple[str, ...] = field(default=())

    # ---- as JSON

    def to_json(self) -> str:
        """The sheet as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Proof:
        """The sheet that `to_json` wrote; ValueError where the text is none."""
        try:
            raw = json.loads(text)
            return Proof(
                measure=_text(raw["measure"]),
                accuracy={_text(name): _number(value) for name, value in raw["accuracy"].items()},
                density=_number(raw["density"]),
                difference=_number(raw["difference"]),
                facts=tuple(_fact_of(row) for row in raw["facts"]),
                latencies=tuple(_latency_of(row) for row in raw["latencies"]),
                units=tuple(_units_of(row) for row in raw["units"]),
                machine=_text(raw["machine"]),
                notes=tuple(map(_text, raw["notes"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"This is no proof sheet: {type(error).__name__}, {error}.") from None

    def write(self, path: str | Path) -> Path:
        """Write the sheet as JSON to `path`, whole or not at all, and return it."""
        path = Path(path)
        write_atomically(path, self.to_json().encode())
        return path

    @staticmethod
    def read(path: str | Path) -> Proof:
        """The sheet that `write` wrote. Raises OSError, or ValueError where the file is damaged."""
        return Proof.from_json(Path(path).read_text(encoding="utf-8"))

    # ---- as tables

    @property
    def comparison(self) -> tuple[tuple[str, ...], list[Line]]:
        """Heading and rows of the table of what the two networks are."""
        return ("", "dense", "sparse", ""), [*self._accuracies(), self._outputs(), *map(_fact, self.facts)]

    @property
    def speed(self) -> tuple[tuple[str, ...], list[Line]]:
        """Heading and rows of the table of latencies."""
        return ("batch", "network", "threads", "p50 ms", "p95 ms", "sparse is"), [
            _latency(row) for row in self.latencies
        ]

    @property
    def verdict(self) -> str:
        """In what the sparse network loses, and where it would be faster than it was here."""
        lost = [line.cells[0] for line in self.comparison[1] if line.good is False]
        slower: dict[str, list[str]] = {}  # than which contender, at which batch sizes
        for row in self.latencies:
            if row.ratio is not None and row.ratio <= 1 - EQUAL:
                slower.setdefault(row.contender, []).append(str(row.batch))
        better = slower.pop(SPARSE_ONNX, None)
        lost += [f"latency against {name} at batch {' and '.join(at)}" for name, at in slower.items()]
        said = f"The sparse network loses in {'; '.join(lost)}." if lost else "The sparse network loses nowhere here."
        if better:
            said += f" At batch {' and '.join(better)} it is faster as an ONNX file: torch-bregman export RUN."
        return said

    @property
    def explanations(self) -> list[str]:
        """What the figures mean: how each was got, where, and what else has to be known."""
        timed = (
            f"latency: {SPARSE} is what optimize_for_inference makes of the shrunk network for this batch size; all "
            "were called in turn, in random order, on the same inputs, in one process, each with one thread or all, "
            "whichever was faster; sparse is … faster: the median over the rounds of the ratio of the times of that "
            f"network and of {SPARSE}"
        )
        return [*(f"{fact.name}: {fact.how}" for fact in self.facts), timed, f"measured on {self.machine}", *self.notes]

    def _accuracies(self) -> Iterator[Line]:
        loss = self.measure.endswith("loss")
        dense, sparse = self.accuracy.get("dense"), self.accuracy.get("sparse")
        shown = {name: f"{v:.4g}" if loss else f"{100 * v:.2f} %" for name, v in self.accuracy.items()}
        if dense is not None or sparse is not None:
            said, good = ("", None) if dense is None or sparse is None else _judged(sparse, dense, loss)
            yield Line((self.measure, shown.get("dense", ""), shown.get("sparse", ""), said), good)
        for name, words in (("shrunk", "after shrinking"), ("optimized", "after optimizing")):
            if name in shown:
                said = "" if sparse is None else _judged(self.accuracy[name], sparse, loss, " trained")[0]
                yield Line((words, "", shown[name], said))

    def _outputs(self) -> Line:
        same = self.difference <= SAME
        said = "the same within rounding" if same else "NOT the outputs of the trained network"
        shown = f"off by {self.difference:.1g}" if self.difference else "the same"
        return Line(("outputs after that", "", shown, said if self.difference else ""), None if same else False)

    def __str__(self) -> str:
        # The first columns and the last are words, those between them figures.
        parts = [
            table([head, *(line.cells for line in lines)], left={*words, len(head) - 1}) + "\n"
            for (head, lines), words in ((self.comparison, {0}), (self.speed, {0, 1}))
        ]
        return "\n".join([*parts, self.verdict, "", *self.explanations])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        made: list[RenderableType] = []
        for (head, lines), text in ((self.comparison, 1), (self.speed, 2)):
            drawn = Table(box=None, pad_edge=False, header_style="dim")
            for i, name in enumerate(head):
                last = i == len(head) - 1
                drawn.add_column(name, justify="left" if i < text or last else "right", no_wrap=not last)
            for line in lines:
                colour = {True: "green", False: "yellow", None: "default"}[line.good]
                drawn.add_row(*map(Text, line.cells[:-1]), Text(line.cells[-1], style=colour))
            made += [drawn, Text()]
        return Group(*made, Text(self.verdict, style="bold"), *(Text(line, style="dim") for line in self.explanations))


# ---- the measuring


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
        dense: the dense twin; None for the architecture of `sparse` with random weights in place of the zeros, which
            has the size and the speed of a twin, and no accuracy.
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
    # Here and not above, as the report reads sheets and has no need of kernels.
    from ..shrink import shrink
    from .inference import optimize_for_inference
    from .save import save_sparse

    inputs, batches = as_inputs(example_inputs), _checked(rounds, batches)
    say = progress or (lambda _: None)
    notes = []
    sparse = copy.deepcopy(sparse).cpu().eval()
    twin = dense is not None
    dense = copy.deepcopy(dense).cpu().eval() if dense is not None else _random_weights(sparse)
    if not twin:
        notes.append("there is no dense twin: size and speed are those of the same network with random weights")

    machine = _machine()
    say("shrinking")
    largest = rows_of(inputs, max(batches))
    small = shrink(sparse, inputs)
    units = tuple(
        Units(r.name, r.kind, _pair(r.before), _pair(r.after), str(r.reason or "")) for r in small.report.rows
    )
    say("choosing the fastest products")
    best = optimize_for_inference(small.model, largest).eval()

    say("size")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        saved = save_sparse(small.model, Path(folder) / "sparse.safetensors")
        pairs = zip(tree_leaves(best(*largest)), tree_leaves(sparse(*largest)), strict=True)
        off = max((difference(a, b) for a, b in pairs if isinstance(b, Tensor)), default=0.0)
        facts = (
            Fact("parameters", _parameters(dense), _parameters(small.model), "",
                 "of the dense network all; of the shrunk one non-zero weights, and all biases and norms"),
            Fact("FLOPs per sample", _flops(dense, inputs), _flops(small.model, inputs), "FLOP",
                 "2 × weights × positions of the Linear and Conv layers by formula, zeros not counted: what has to be "
                 "computed, not what a dense kernel does"),
            Fact("file", _dense_bytes(dense), saved.bytes, "B",
                 "dense: safetensors; sparse: what save_sparse makes of the shrunk network"),
            Fact(f"memory at batch {max(batches)}", _memory(dense, largest), _memory(best, largest), "B",
                 "what the network holds and the most that its tensors take at once in a forward pass, added up "
                 "allocation by allocation, without the libraries' own scratch; an optimized network also keeps "
                 "what is left of its dense weights, for inputs that the sparse products cannot take"),
        )  # fmt: skip

    networks = {"dense": dense, "sparse": sparse, "shrunk": small.model, "optimized": best}
    scores: dict[str, float] = {}
    for name, network in networks.items():
        score = accuracy.get(name) if isinstance(accuracy, Mapping) else accuracy
        if callable(score):
            if name == "dense" and not twin:
                continue
            say(f"{measure}, {name}")
            score = score(network)
        if score is not None and math.isfinite(score):
            scores[name] = float(score)

    threads = torch.get_num_threads()

    def fast(x: tuple[Tensor, ...]) -> nn.Module:
        if torch.get_num_threads() == threads and [t.shape for t in x] == [t.shape for t in largest]:
            return best
        return optimize_for_inference(small.model, x)

    makers: dict[str, Maker] = {
        DENSE: lambda x: functools.partial(dense, *x),
        COMPILED: _compiled(dense),
        ONNX: _in_onnxruntime(dense, inputs),
        SPARSE: lambda x: functools.partial(fast(x), *x),
        SPARSE_ONNX: _in_onnxruntime(small.model, inputs),
    }
    if not rivals:
        makers = {name: makers[name] for name in (DENSE, SPARSE)}
    latencies = _latencies(makers, {batch: rows_of(inputs, batch) for batch in batches}, rounds, say)
    return Proof(
        measure=measure, accuracy=scores, density=density(sparse), facts=facts, latencies=tuple(latencies), units=units,
        difference=off if off < 1e300 else 1e300,  # JSON has no infinity and no nan
        machine=machine, notes=tuple(notes),
    )  # fmt: skip


def _checked(rounds: int, batches: Sequence[int]) -> tuple[int, ...]:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"Invalid `rounds`: {rounds!r}; expected a whole number of at least 1.")
    sizes = tuple(batches)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise ValueError(f"Invalid `batches`: {batches!r}; expected batch sizes of at least 1.")
    return tuple(dict.fromkeys(sizes))


def _random_weights(sparse: nn.Module) -> nn.Module:
    """The same network with random Linear and Conv weights, none of them zero."""
    dense, generator = copy.deepcopy(sparse), torch.Generator().manual_seed(0)
    for layer in weight_layers(dense):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.fan_in**-0.5)
    return dense


def _parameters(model: nn.Module) -> int:
    """Non-zero Linear and Conv weights, and all other parameters."""
    weights = {id(layer.weight) for layer in weight_layers(model)}
    return sum(int(p.count_nonzero()) if id(p) in weights else p.numel() for p in model.parameters())


def _flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """2 · non-zero weights · positions, per sample: positions as a forward pass has them."""
    return float(sum(forward_flops(model, rows_of(inputs, 1), zeros=False).values()))


def _dense_bytes(model: nn.Module) -> int:
    """Of a safetensors file with all parameters and buffers."""
    once = {t.untyped_storage().data_ptr(): (name, t) for name, t in model.state_dict().items()}
    return len(to_safetensors({name: t.contiguous() for name, t in once.values()}))


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that are alive at once, in `most`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


def _memory(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that the network holds, and the most that the tensors of a forward pass take at once."""
    model(*inputs)  # what is made in the first call is held
    with _Alive() as alive:
        model(*inputs)
    return _held(model) + alive.most


def _held(root: object) -> int:
    """Bytes of the tensors and arrays that can be reached from a module, each counted once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            sizes[thing.__array_interface__["data"][0]] = thing.nbytes
        elif isinstance(thing, Mapping):
            stack += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            stack += thing
        elif isinstance(thing, functools.partial):
            stack += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, types.MethodType):
            stack += [thing.__self__, thing.__func__]
        elif isinstance(thing, types.FunctionType):
            for cell in thing.__closure__ or ():
                try:
                    stack.append(cell.cell_contents)
                except ValueError:  # not filled yet
                    continue
        elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("torch_bregman"):
            stack += getattr(thing, "__dict__", {}).values()
            stack += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    return sum(sizes.values())


# ---- latency


def _latencies(
    makers: Mapping[str, Maker], inputs: Mapping[int, tuple[Tensor, ...]], rounds: int, say: Callable[[str], None]
) -> Iterator[Latency]:
    """Of every contender at every batch size, with one thread or all."""
    threads = torch.get_num_threads()
    for batch, x in inputs.items():
        calls: dict[tuple[str, int], Call] = {}
        missing = {}
        try:
            with torch.no_grad():
                for name, make in makers.items():
                    say(f"latency at batch {batch}: getting ready: {name}")
                    try:
                        with silence():
                            calls |= _ready(name, make, x, threads)
                    except Exception as error:
                        if name in (DENSE, SPARSE):
                            raise
                        missing[name] = reason(error)
                with without_collection():
                    times = race(
                        calls, rounds, block=BLOCK, before=lambda key: torch.set_num_threads(key[1]),
                        say=lambda i, at=batch: say(f"latency at batch {at}: round {max(i, 1)} of {rounds}"),  # type: ignore[misc]
                    )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        # By the mean: threads that now and then wait for a busy core have a good median.
        best = dict(sorted(calls, key=lambda key: float(np.mean(np.concatenate(times[key]))), reverse=True))
        for name in makers:
            if name in missing:
                yield Latency(name, batch, missing=missing[name])
                continue
            own, other = times[name, best[name]], times[SPARSE, best[SPARSE]]
            p50, p95 = np.quantile(np.concatenate(own), (0.5, 0.95))
            ratio = statistics.median(float(np.median(a) / np.median(b)) for a, b in zip(own, other, strict=True))
            yield Latency(name, batch, best[name], float(p50), float(p95), ratio)


def _ready(name: str, make: Maker, x: tuple[Tensor, ...], threads: int) -> dict[tuple[str, int], Call]:
    """The calls of a contender with all threads and with one, each called once: that may compile."""
    made = {}
    for number in dict.fromkeys((threads, 1)):
        torch.set_num_threads(number)
        made[name, number] = call = make(x)
        call()
    return made


def _compiled(model: nn.Module) -> Maker:
    """Compiled for each batch size and number of threads by itself, as is fastest."""
    last: list[object] = []

    def make(x: tuple[Tensor, ...]) -> Call:
        if not any(x is one for one in last):
            # torch keeps eight versions of a network at most, and then goes on uncompiled.
            torch.compiler.reset()
            last.append(x)
        return functools.partial(torch.compile(model, dynamic=False), *x)

    return make


def _in_onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Maker:
    """In a session of onnxruntime with as many threads as torch has."""

    @functools.cache
    def content() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return save_onnx(model, inputs, Path(folder) / "model.onnx").read_bytes()

    @functools.cache
    def session(threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads wait busily for the next call, and would take the processor from whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(content(), options, providers=["CPUExecutionProvider"])

    def make(x: tuple[Tensor, ...]) -> Call:
        try:
            running = session(torch.get_num_threads())
        except ImportError as error:
            raise ImportError(f'{error.name} is not installed: pip install "torch-bregman[export]"') from error
        used = {entry.name for entry in running.get_inputs()}
        given = {name: tensor.numpy() for name, tensor in zip(names_of("input", x), x, strict=True) if name in used}
        return lambda: running.run(None, given)

    return make


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


# ---- words


def _judged(value: float, other: float, loss: bool, than: str = "") -> tuple[str, bool | None]:
    """How `value` compares with `other`, and whether it is the better one."""
    if loss:
        if abs(value - other) <= SAME * abs(other):
            return f"the same{than and ' as' + than}", None
        return f"{abs(value / other - 1):.1%} {'lower' if value < other else 'higher'}{than and ' than' + than}", (
            value < other
        )
    points = round(100 * (value - other), 2)
    if points == 0:
        return f"the same{than and ' as' + than}", None
    return f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}{than and ' than' + than}", points > 0


def _fact(fact: Fact) -> Line:
    dense, sparse = _amount(fact.dense, fact.unit), _amount(fact.sparse, fact.unit)
    return Line((fact.name, dense, sparse, *_times(fact.dense, fact.sparse, "less", "more")[:1]), _wins(fact))


def _wins(fact: Fact) -> bool | None:
    return _times(fact.dense, fact.sparse, "", "")[1]


def _times(dense: float, sparse: float, better: str, worse: str) -> tuple[str, bool | None]:
    """ "3.2 × less", and whether that is good; None within `EQUAL`."""
    if dense <= 0 or sparse <= 0:
        return "", None if dense == sparse else sparse < dense
    ratio = dense / sparse
    if 1 - EQUAL < ratio < 1 / (1 - EQUAL):
        return "about equal", None
    return (f"{_short(ratio)} × {better}", True) if ratio > 1 else (f"{_short(1 / ratio)} × {worse}", False)


def _latency(row: Latency) -> Line:
    batch = str(row.batch)
    if row.p50 is None or row.p95 is None or row.ratio is None:
        return Line((batch, row.contender, "", "—", "—", f"not measured: {row.missing}"))
    threads = "" if row.threads is None else str(row.threads)
    p50, p95 = _milliseconds(row.p50), _milliseconds(row.p95)
    if row.contender == SPARSE:
        return Line((batch, row.contender, threads, p50, p95, ""))
    said, good = _times(row.ratio, 1.0, "faster", "slower")
    return Line((batch, row.contender, threads, p50, p95, said), None if row.contender == SPARSE_ONNX else good)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}" if seconds < 0.1 else f"{1e3 * seconds:,.1f}"


def _amount(value: float, unit: str) -> str:
    """ "8,680", "34.7 kB", "1.25 MFLOP"."""
    if not unit:
        return f"{value:,.0f}"
    if value < 1000:
        return f"{value:,.0f} {unit}"
    power = min(int(math.log10(value)) // 3, 5)
    return f"{value / 1000.0**power:.3g} {' kMGTP'[power]}{unit}"


# ---- what a file may hold


def _fact_of(row: Any) -> Fact:
    return Fact(
        _text(row["name"]), _number(row["dense"]), _number(row["sparse"]), _text(row["unit"]), _text(row["how"])
    )


def _latency_of(row: Any) -> Latency:
    threads = None if row["threads"] is None else int(_number(row["threads"]))
    p50, p95, ratio = (None if row[key] is None else _number(row[key]) for key in ("p50", "p95", "ratio"))
    return Latency(_text(row["contender"]), int(_number(row["batch"])), threads, p50, p95, ratio, _text(row["missing"]))


def _units_of(row: Any) -> Units:
    return Units(
        _text(row["layer"]), _text(row["kind"]), _pair(row["before"]), _pair(row["after"]), _text(row["reason"])
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return "".join(c if c.isprintable() else " " for c in value)[:1000]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{type(value).__name__} in place of a number")
    return value


def _pair(value: Sequence[int]) -> tuple[int, int]:
    first, second = value
    return int(_number(first)), int(_number(second))
