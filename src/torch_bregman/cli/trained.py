"""The network of a run that has ended, and where what is made of it may be written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import Dataset, load
from ..models import build
from ..train.errors import RunError
from ..train.recipe import Recipe
from ..train.trial import dtype_of
from .runs import finished, read_recipe

SAMPLES = 64  # that stand for the inputs of a network when it is shrunk, exported or timed


@dataclass(frozen=True)
class Trained:
    """The network of a run that has ended, with the weights that were kept, in eval mode on the CPU."""

    recipe: Recipe
    data: Dataset
    model: nn.Module
    weights: Path

    @property
    def inputs(self) -> Tensor:
        """Samples of the validation data."""
        return self.data.validation.x[:SAMPLES]


def trained(run: Path, data: Dataset | None = None) -> Trained:
    """Load what a run has made; RunError where there is nothing, or where it is damaged."""
    recipe = read_recipe(run)
    if finished(run) is None:
        raise RunError(f"The run {run} has not ended; go on with: torch-bregman train --resume {run}")
    weights = next((path for name in ("best", "last") if (path := run / f"{name}.safetensors").is_file()), None)
    if weights is None:
        raise RunError(f"There are no weights in {run}: neither best.safetensors nor last.safetensors.")
    if data is None:
        root = run / "data-root"
        data = load(recipe.dataset, Path(root.read_text()) if root.exists() else None, limit=recipe.limit)
    model = build(recipe.model, data.shape, len(data.classes))
    try:
        tensors = load_file(weights)
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except (SafetensorError, OSError) as error:
        raise RunError(f"The weights {weights} are damaged: {error}") from None
    except RuntimeError as error:
        raise RunError(f"The weights {weights} do not fit the model {recipe.model}: {error}") from None
    # Of tied tensors one is in the file.
    state = model.state_dict()
    there = {state[name].data_ptr() for name in tensors if name in state}
    missing = [name for name in missing if state[name].numel() and state[name].data_ptr() not in there]
    if missing or unknown:
        name = [*missing, *unknown][0]
        raise RunError(f"The weights {weights} are not those of the model {recipe.model}: {name} is in one only.")
    return Trained(recipe, data.to("cpu", dtype_of(model)), model.eval(), weights)


def writable(path: Path) -> Path:
    """`path`, or a RunError before the work that would be lost."""
    if path.is_dir():
        raise RunError(f"Cannot write {path}: it is a folder; --out names a file.")
    if not path.parent.is_dir():
        raise RunError(f"Cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"Cannot write {path}: the folder {path.parent} is read-only.")
    return path
