"""Made the files beside it, once, with version 0.1.0 (commit 08e6081). It is kept to say how.

git worktree add ../before 08e6081
PYTHONPATH=../before/src:tests python tests/data/v0.1.0/make.py
"""

import contextlib
import copy
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import saved
import torch
from safetensors.torch import save_file

import torch_bregman as tb
from torch_bregman.train import Recipe, fit, loop

HERE = Path(__file__).parent
torch.set_num_threads(1)


def states() -> None:
    found = {}
    for name in saved.CASES:
        model, optimizer, also = saved.make(name)
        saved.train(model, optimizer, also, saved.STEPS)
        found[name] = {
            "model": {k: v.clone() for k, v in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "also": [one.state_dict() for one in also],
        }
        found[name] = copy.deepcopy(found[name])  # before it goes on
        saved.train(model, optimizer, also, saved.MORE)
        if also and hasattr(also[-1], "leave"):
            also[-1].leave()
        found[name]["after"] = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(found, HERE / "states.pt")


def files() -> None:
    outputs = {}
    for name in saved.FILES:
        model, x, shrunk = saved.prepared(name)
        small = tb.shrink(model, (x,)).model if shrunk else model
        tb.save_sparse(small, HERE / f"{name}.safetensors", dtype=torch.bfloat16 if "bfloat16" in name else None)
        with torch.no_grad():
            outputs[name] = small.eval()(x).contiguous()
    save_file(outputs, HERE / "outputs.safetensors")


def stopped_after(steps: int) -> None:
    """SIGTERM in the training loop, after so many looks for it."""
    loop.LOOK_EVERY = 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    original, count = schedule.step, [0]

    def step(self, *args):
        original(self, *args)
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    schedule.step = step


def runs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "smallnet.py").write_text(saved.SMALLNET)
        sys.path.insert(0, folder)
        for name, options in saved.RUNS.items():
            recipe = Recipe(dataset="digits", model="smallnet:net", threads=1, **options).check()
            whole = Path(folder) / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            fit(recipe, whole, quiet=True)
            run = HERE / name
            shutil.rmtree(run, ignore_errors=True)
            if name == "ended":
                shutil.copytree(whole, run)
            else:
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR
                original = schedule.step
                stopped_after(4)
                with contextlib.suppress(loop.Stopped):
                    fit(recipe, run, quiet=True)
                schedule.step = original
                shutil.copy(whole / "last.safetensors", run / "expected.safetensors")
            recipe.write(run / "recipe.toml")
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
            for path in run.iterdir():
                if path.suffix in (".html", ".previous", ".npz"):
                    path.unlink()


if __name__ == "__main__":
    states()
    files()
    runs()
