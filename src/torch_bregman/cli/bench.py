"""`torch-bregman bench`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..report import write_report
from ..train.denoising import Denoising
from ..train.errors import RunError, writing
from ..train.evaluation import evaluate
from .app import REFRESH, app
from .runs import finished
from .trained import trained


@app.command
def bench(
    run: Path,
    /,
    *,
    rounds: int = 30,
    batch: str = "1,64",
    rivals: bool = True,
) -> None:
    """Prove what the sparse network of a run is worth: accuracy, size and speed beside the dense one, in one table.

    The network is shrunk and made fast for this machine, its accuracy is measured again, and it is timed against the
    dense network in PyTorch, with torch.compile and in ONNX Runtime, in turn and in random order. The dense network is
    the twin of `train --compare`; without one its size and speed are those of the same network with random weights.
    Where the sparse network loses, the table says so. Writes RUN/proof.json, and the table into RUN/report.html.

    * `torch-bregman bench RUN` - the whole sheet, in a minute or two; a large network takes longer.
    * `torch-bregman bench RUN --no-rivals --rounds 10` - a quick look, against dense PyTorch only.
    * `torch-bregman bench RUN --batch 1` - as one sample after the other comes in.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    rounds
        How often each network is timed; more rounds steady the figures.
    batch
        Batch sizes to time, with commas between them.
    rivals
        Also torch.compile and ONNX Runtime (extra 'export').
    """
    from ..proof import prove

    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError:
        raise RunError(
            f"Invalid --batch {batch}: expected whole numbers with commas between them, as in 1,64."
        ) from None
    done = trained(run)
    end, recipe = finished(run) or {}, done.recipe
    twin, notes = None, []
    if (run / "dense").is_dir():
        if (last := finished(run / "dense")) is None:
            notes.append(f"the dense twin has not been trained to its end: torch-bregman train --resume {run}")
        else:
            twin = trained(run / "dense", done.data)
    if recipe.precision != "32":
        notes.append(f"trained in {recipe.precision}, measured here in float32")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)

    measure = "test_accuracy" if "test_accuracy" in end else "test_loss"
    denoising = Denoising.of(done.model, done.data, recipe)

    def score(model: nn.Module) -> float:
        scores = evaluate(model, done.data.test, denoising, nullcontext, {})
        return scores[measure.replace("test_", "val_")]

    # What was measured when the runs ended stands; what was made of the network since is measured now.
    known: dict[str, Any] = {"sparse": end.get(measure), "shrunk": score, "optimized": score}
    if twin is not None and last is not None:
        known["dense"] = last.get(measure)
    console = Console()
    with console.status("", refresh_per_second=REFRESH) as status:
        proof = prove(
            twin.model if twin is not None else None, done.model, done.inputs, accuracy=known,
            measure=measure.replace("_", " "), rounds=rounds, batches=batches, rivals=rivals, progress=status.update,
        )  # fmt: skip
    proof = replace(proof, notes=(*proof.notes, *notes))
    path = run / "proof.json"
    with writing(path):
        proof.write(path)
    report_path = write_report(run)
    console.print(proof)
    print(f"{path}\n{report_path}")
