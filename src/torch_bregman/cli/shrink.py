"""`torch-bregman shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..train.errors import writing
from .app import app
from .trained import trained, writable


@app.command
def shrink(run: Path, /, *, out: Annotated[Path | None, Parameter(alias="-o")] = None) -> None:
    """Cut what the network of a run does not use, and write the smaller one, which computes the same.

    Neurons and filters without weights, and all that belongs to them, are left out; the table says what went, and why
    the rest had to stay. Single weights that are zero stay zeros in the layers, and take no bytes in the file.

    The file is read back with `tb.load_sparse(model, FILE)`, where `model` is a fresh network as it was trained:
    it becomes the small one.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    out
        The file to write. [RUN/shrunk.safetensors]
    """
    from ..export.save import save_sparse
    from ..shrink import shrink as shrunk

    done = trained(run)
    path = writable(out or run / "shrunk.safetensors")
    small = shrunk(done.model, (done.inputs,))
    with writing(path):
        saved = save_sparse(small.model, path)
    print(f"{small.report}\n")
    before = done.weights.stat().st_size
    print(f"{done.weights}: {before:,} bytes, {before / saved.bytes:.1f} times as many as the file written.")
    print(saved)
