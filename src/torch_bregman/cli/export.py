"""`torch-bregman export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console

from ..train.errors import RunError, writing
from .app import REFRESH, app
from .trained import trained, writable


@app.command
def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "program", "sparse"] = "onnx",
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
) -> None:
    """Write the network of a run as a file for other programs, checked to compute the same.

    onnx and program hold the shrunk network, with zeros where single weights are zero; the batch may have any size.

    * `torch-bregman export RUN` - ONNX, for onnxruntime and many others: RUN/model.onnx. Needs the extra 'export'.
    * `torch-bregman export RUN --format program` - for PyTorch without your code, with torch.export.load:
      RUN/model.pt2.
    * `torch-bregman export RUN --format sparse --dtype float16` - the network as it was trained, zeros left out and the
      rest in half the bytes, for tb.load_sparse: RUN/sparse.safetensors.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    format
        onnx, program (torch.export) or sparse.
    out
        The file to write.
    dtype
        What the values of a sparse file are rounded to. [as trained]
    """
    from ..export.formats import save_onnx, save_program
    from ..export.save import save_sparse
    from ..shrink import shrink as shrunk

    if dtype is not None and format != "sparse":
        raise RunError(f"--dtype rounds the values of --format sparse; --format {format} keeps them as trained.")
    done = trained(run)
    path = writable(out or run / {"onnx": "model.onnx", "program": "model.pt2", "sparse": "sparse.safetensors"}[format])
    if format == "sparse":
        with writing(path):
            print(save_sparse(done.model, path, dtype=getattr(torch, dtype) if dtype else None))
        return
    with Console().status(f"exporting and checking {path}", refresh_per_second=REFRESH):
        small = shrunk(done.model, (done.inputs,)).model
        try:
            with writing(path):
                (save_onnx if format == "onnx" else save_program)(small, done.inputs, path)
        except ImportError as error:
            raise RunError(str(error)) from None
    print(f"{path}: {path.stat().st_size:,} bytes, the same outputs at every batch size that was tried")
