"""The networks that are timed against each other, each ready to be called: eager, compiled, in ONNX Runtime."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export.formats import names_of, save_onnx

Call = Callable[[], object]
# of the call of a contender on these inputs, for torch's number of threads
Maker = Callable[[tuple[Tensor, ...]], Call]


def compiled(model: nn.Module) -> Maker:
    """Compiled for each batch size and number of threads by itself, as is fastest."""
    last: list[object] = []

    def make(x: tuple[Tensor, ...]) -> Call:
        if not any(x is one for one in last):
            # torch keeps eight versions of a network at most, and then goes on uncompiled.
            torch.compiler.reset()
            last.append(x)
        return functools.partial(torch.compile(model, dynamic=False), *x)

    return make


def in_onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Maker:
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
