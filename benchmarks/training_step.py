"""What the parts of a training step cost: the passes through the network, the optimizer, the control of λ.

    python benchmarks/training_step.py [--device cuda] [--model resnet18] [--batch 128] [--rounds 30]

Two times per line, in milliseconds per call: until Python has said what to do ("cpu"), and until the device has done it
("all"); means over the rounds. On a GPU the passes are timed as Python calls them and replayed as CUDA graphs
(--cuda-graphs of `torch-bregman train`), in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.data.augment import crop_flip
from torch_bregman.models import build
from torch_bregman.train.graphs import Replayed
from torch_bregman.train.recipe import Recipe, make_control, make_optimizer
from torch_bregman.train.start import start_sparse

IMAGE = (3, 32, 32)


def clock(call: Callable[[], Any], rounds: int, device: str) -> str:
    """Milliseconds per call, as a text."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(min(5, rounds)):
        call()
    wait()
    began = time.perf_counter()
    for _ in range(rounds):
        call()
    said = time.perf_counter() - began
    wait()
    done = time.perf_counter() - began
    return f"cpu {1e3 * said / rounds:8.2f} ms   all {1e3 * done / rounds:8.2f} ms"


def passes(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A function that makes the gradients of a batch."""

    def run() -> None:
        model.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(call(x), y)
        loss.backward()

    return run


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device = args.device

    def say(name: str, call: Callable[[], Any]) -> None:
        print(f"{name:34}{clock(call, args.rounds, device)}", flush=True)

    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}; {args.model}, batches of {args.batch}")
    torch.backends.cudnn.deterministic = True
    common: dict[str, Any] = {"model": args.model, "dataset": "cifar10", "lr": 1e-5}
    recipes = {
        name: Recipe(optimizer=name, momentum=momentum, density=density, **common).check()
        for name, momentum, density in (
            ("adabreg", 0.0, 0.034), ("linbreg", 0.9, 0.034), ("adam", 0.0, None), ("sgd", 0.9, None),
        )
    }  # fmt: skip

    def start() -> nn.Module:
        torch.manual_seed(0)
        model = build(args.model, IMAGE, 10)
        start_sparse(recipes["adabreg"], model)
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    x = torch.randn(args.batch, *IMAGE, device=device)
    y = torch.randint(10, (args.batch,), device=device)
    generator = torch.Generator(device)
    say("crop and flip", lambda: crop_flip(x, generator.manual_seed(1)))
    x = x.contiguous(memory_format=torch.channels_last)
    model = start()
    say("passes", passes(model, model, x, y))
    if device == "cuda":
        say("passes, replayed", passes(Replayed(model, args.batch), model, x, y))
    for kind, recipe in recipes.items():
        model = start()
        passes(model, model, x, y)()
        optimizer = make_optimizer(recipe, model)
        say(f"{kind}, step", optimizer.step)
        if isinstance(optimizer, tb.LinBreg | tb.AdaBreg):
            control = make_control(recipe, optimizer, model, 10**6)
            assert control is not None
            say(f"{kind}, density made exact", control.land)


if __name__ == "__main__":
    main()
