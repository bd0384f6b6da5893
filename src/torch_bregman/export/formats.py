"""A network as a file that other programs run: ONNX, and an archive of torch.export. Both are checked before they stay.

A file is written only if it computed what the network computes, to `TOLERANCE`, on the example inputs and on
random ones at other batch sizes.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..compare import difference, random_like
from ..distributed import require_whole
from ..extras import needs_extra
from ..files import write_atomically
from ..network.copied import copied
from ..network.wrapped import bare
from .reasons import onnx_reason, reason

__all__ = ["save_onnx", "save_program"]

TOLERANCE = 1e-5  # of the largest output; coarser number formats get four times their own precision
OLDEST_OPSET = 18  # what torch's exporter is written for; older ones would need a conversion that can fail
LIMIT = 2_000_000_000  # bytes: a protobuf message ends at 2 GiB

Outputs = list[Tensor]


def save_onnx(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], path: str | Path, *, opset: int | None = None
) -> Path:
    """Write `model` as an ONNX file in which the first dimension of every input and output is the batch, of any size.

    Inputs are called "input" and outputs "output", or "input_0", "input_1", … where there are several. The network is
    exported in eval mode and left in the mode it was in. The file is checked by onnx, and where onnxruntime is
    installed it is run on the example inputs and on random ones at other batch sizes.

    Args:
        model: the network; what it computes may not depend on the values of its inputs in Python.
        example_inputs: a tensor, or a tuple of the tensors that `model` is called with. Their values are not stored.
        path: the file to write; an existing one is replaced when the new one is whole and checked.
        opset: version of the ONNX operators; None for the one that torch recommends.

    Returns:
        `path`.

    Raises:
        ImportError: onnx or onnxscript are missing: pip install "torch-bregman[export]".
        ValueError: the model cannot be exported, with the reason, or the file computes something else.
        OSError: the file could not be written; what was there before stays.
    """
    with needs_extra("export"):
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter is written in it
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise ValueError(f"Invalid `opset`: {opset!r}; expected a whole number, or None.")
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"Invalid `opset`: {opset}; expected {OLDEST_OPSET} to {newest}.")
    path, inputs = Path(path), as_inputs(example_inputs)
    with in_eval_mode(model) as still, silence():
        size = sum(t.nbytes for t in (*still.parameters(), *still.buffers()))
        if size > LIMIT:
            raise ValueError(f"`model` has {size:,} bytes; ONNX files hold {LIMIT:,}. save_program has no such limit.")
        outputs = _run(still, inputs)
        program, shapes = _trace(still, inputs)
        names: Any = {"input_names": names_of("input", inputs), "output_names": names_of("output", outputs)}
        try:
            made: Any = torch.onnx.export(
                program, _blank(inputs), dynamo=True, external_data=False, verbose=False, opset_version=opset,
                dynamic_shapes=shapes, **names,
            )  # fmt: skip
        except Exception as error:
            raise ValueError(f"`model` cannot be written as ONNX: {onnx_reason(error, program)}") from error
        content = made.model_proto.SerializeToString()
        try:
            onnx.checker.check_model(content, full_check=True)
        except onnx.checker.ValidationError as error:
            raise ValueError(f"The ONNX file is not valid: {reason(error)}") from error
        got = {entry.domain: entry.version for entry in made.model_proto.opset_import}.get("")
        if opset is not None and got != opset:
            raise ValueError(f"Invalid `opset`: {opset}; this network could only be written with opset {got}.")
        if (runner := _onnx_runner(content)) is not None:
            _compare(still, runner, inputs, "The ONNX file")
    write_atomically(path, content)
    return path


def save_program(model: nn.Module, example_inputs: Tensor | Sequence[Tensor], path: str | Path) -> Path:
    """Write `model` as an archive of torch.export: `torch.export.load(path).module()(x)` runs it without its code.

    The first dimension of every input is the batch, of any size. The network is exported in eval mode and left in the
    mode it was in. The archive is loaded again and run on the example inputs and on random ones at other batch sizes.

    Args:
        model: the network; what it computes may not depend on the values of its inputs in Python.
        example_inputs: a tensor, or a tuple of the tensors that `model` is called with. Their values are not stored.
        path: the file to write, ending in ".pt2"; an existing one is replaced when the new one is whole and checked.

    Returns:
        `path`.

    Raises:
        ValueError: the model cannot be exported, with the reason, the archive computes something else, or `path` has
            another ending.
        OSError: the file could not be written; what was there before stays.
    """
    path, inputs = Path(path), as_inputs(example_inputs)
    if path.suffix != ".pt2":
        raise ValueError(f"Invalid `path`: {str(path)!r}; expected a name that ends in .pt2.")
    with in_eval_mode(model) as still, silence():
        _run(still, inputs)
        program, _ = _trace(still, inputs)
        archive = io.BytesIO()
        try:
            torch.export.save(program, archive)
        except Exception as error:
            raise ValueError(f"`model` cannot be written as a torch.export archive: {reason(error)}") from error
        archive.seek(0)
        loaded = torch.export.load(archive).module()
        _compare(still, lambda given: _tensors(loaded(*given)), inputs, "The archive")
    write_atomically(path, archive.getvalue())
    return path


def rows_of(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """`inputs` at another batch size: their rows, repeated in turn as often as needed. Scalars stay as they are."""
    return tuple(x[torch.arange(batch, device=x.device) % len(x)] if x.dim() else x for x in inputs)


# ---- tracing


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, Any]:
    """The network as torch.export sees it, and the shapes that may vary."""
    batch = torch.export.Dim("batch", min=1)
    # One entry per argument of forward, where *args is a single one.
    arguments = inspect.signature(model.forward).bind(*inputs).arguments.values()
    shapes = tree_map(lambda x: {0: batch} if x.dim() else {}, tuple(arguments))
    try:
        return torch.export.export(model, _blank(inputs), dynamic_shapes=shapes, strict=False), shapes
    except Exception as error:
        raise ValueError(f"`model` cannot be exported: {reason(error)}") from error


def _blank(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of the same kind without the values, which an archive would keep; two rows, as one is taken for fixed."""
    return tuple(torch.zeros_like(x) for x in rows_of(inputs, max(2, _batch(inputs))))


# ---- checking


def _compare(
    model: nn.Module, other: Callable[[tuple[Tensor, ...]], Outputs], inputs: tuple[Tensor, ...], what: str
) -> None:
    """ValueError unless `other` computes what `model` computes, for the example inputs and at other batch sizes."""
    generator = torch.Generator().manual_seed(0)
    for given in (inputs, *(_random(inputs, batch, generator) for batch in (1, _batch(inputs) + 3))):
        try:
            found = other(given)
        except Exception as error:
            sizes = ", ".join(str(tuple(x.shape)) for x in given)
            raise ValueError(f"{what} fails on inputs of shape {sizes}: {reason(error)}") from error
        expected = _run(model, given)
        if len(found) != len(expected):
            raise ValueError(f"{what} returns {len(found)} tensors; the network returns {len(expected)}.")
        for a, b in zip(found, expected, strict=True):
            off, allowed = difference(a, b), _tolerance(b)
            if not off <= allowed:
                raise ValueError(
                    f"{what} differs from the network by {off:.2g} of the largest output at batch size "
                    f"{_batch(given)}; {allowed:.0e} is allowed."
                )


def _tolerance(like: Tensor) -> float:
    return max(TOLERANCE, 4 * torch.finfo(like.dtype).eps if like.is_floating_point() else 0.0)


def _random(inputs: tuple[Tensor, ...], batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random inputs of the same kind, at this batch size."""
    return tuple(random_like(x, (batch, *x.shape[1:]) if x.dim() else (), generator) for x in inputs)


def _onnx_runner(content: bytes) -> Callable[[tuple[Tensor, ...]], Outputs] | None:
    """Runs an ONNX file, or None where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot run the ONNX file: {reason(error)}") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> Outputs:
        # An input that the network does not use is not in the file.
        given = dict(zip(names_of("input", inputs), inputs, strict=True))
        return [torch.from_numpy(y) for y in session.run(None, {name: given[name].numpy() for name in names})]

    return run


# ---- small things


def as_inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The example inputs as a tuple on the CPU, or a ValueError."""
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not given or not all(isinstance(x, Tensor) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
        raise ValueError(f"Invalid `example_inputs`: {kinds}; expected a tensor or a tuple of tensors.")
    sizes = {len(x) for x in given if x.dim()}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(x.shape)) for x in given)
        raise ValueError(f"Invalid `example_inputs`: shapes {shapes}; expected one batch of at least one sample.")
    return tuple(x.detach().cpu() for x in given)


def _batch(inputs: tuple[Tensor, ...]) -> int:
    return next(len(x) for x in inputs if x.dim())


def names_of(stem: str, tensors: Sequence[Tensor]) -> list[str]:
    """What the tensors are called in an ONNX file."""
    return [stem] if len(tensors) == 1 else [f"{stem}_{i}" for i in range(len(tensors))]


def _tensors(outputs: Any) -> Outputs:
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Outputs:
    """The tensors that the network returns; ValueError where it does not take the inputs."""
    try:
        return _tensors(model(*inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"`model` cannot be called on `example_inputs` {shapes}: {reason(error)}") from error


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode on the CPU: itself where it lies there, else a copy. Every module's mode comes back."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"Invalid `model`: {type(model).__name__}; expected a torch.nn.Module.")
    model = bare(model)
    require_whole(model, "an export")
    if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
        model = copied(model).cpu()
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def silence() -> Iterator[None]:
    """Without the exporter's notes to its developers; what matters comes back as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
