"""Sparse inference beside the dense network in eager torch, torch.compile and onnxruntime.

    python benchmarks/inference.py [--rounds 60] [--only mlp|convnet|tokens|resnet] [--data-root DIR]

All with as many threads (--threads 2), in one process, in turn and in random order. Before its turn a network waits
until the idle threads of the one before have gone to sleep (they spin for milliseconds, on the cores that it needs) and
makes three calls that are not timed; the mean of the three that follow is one figure. Medians in µs; the ratio is
that of the faster of torch.compile and onnxruntime on the dense network to ours, round by round: median [quartiles].
"least" is the ratio of the shortest times: on a machine that others use it is the one that says most, for a thread of
two that has to wait for its core makes every call of a network with two threads many times as long.

Supports are random, of the density that is given. The last layer stays dense, and of the 25 weights of the ConvNet's
first filters at least 20 % stay: so hardly a unit is dead, and nothing comes from leaving units out. The rivals run the
same network with its zeros. Inputs: normal (nothing is zero) and MNIST digits between 0 and 1 (most pixels are zero,
which our loops leave out at batch 1).
"""

from __future__ import annotations

import argparse
import functools
import io
import logging
import os
import platform
import random
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import paired
from torch import Tensor, nn

import torch_bregman as tb
from torch_bregman.data import idx
from torch_bregman.inference import optimize_for_inference
from torch_bregman.models import convnet, mlp
from torch_bregman.models.resnet import ResNet

IMAGE = (1, 28, 28)
DENSITIES = {"mlp": (0.1, 0.05, 0.02, 0.01), "convnet": (0.1, 0.03, 0.02, 0.01)}
BATCHES = (1, 64)


def network(kind: str, density: float) -> nn.Module:
    torch.manual_seed(0)
    net = mlp(IMAGE, 10, hidden=(1200, 900)) if kind == "mlp" else convnet(IMAGE, 10)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers[:-1]:
        share = max(density, 0.2) if layer.weight[0].numel() <= 25 else density
        layer.weight.data.mul_(torch.rand_like(layer.weight) < share)
    return net.eval().requires_grad_(False)


def inputs(batch: int, root: Path | None) -> dict[str, Tensor]:
    found = {"normal": torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))}
    if root is not None:
        images = idx.read("mnist", root, None).train[0][:batch]
        found["mnist"] = torch.tensor(np.array(images), dtype=torch.float32).reshape(batch, *IMAGE) / 255
    return found


def exported(net: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    """The network in onnxruntime, for inputs of this shape."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name, value = session.get_inputs()[0].name, x.numpy()
    return lambda: session.run(None, {name: value})[0]


def compare(label: str, net: nn.Module, x: Tensor, options: argparse.Namespace, *, show: bool = False) -> None:
    """One line of the table."""
    torch.compiler.reset()
    ours = optimize_for_inference(net, (x,))
    compiled = torch.compile(net)
    session = exported(net, x, options.threads)
    with torch.inference_mode():
        wanted = net(x)
        scale = wanted.abs().max().item()
        gap = max((y - wanted).abs().max().item() for y in (ours(x), compiled(x), torch.from_numpy(session()))) / scale
        assert gap < 1e-4, gap
        jobs = {"ours": lambda: ours(x), "eager": lambda: net(x), "compile": lambda: compiled(x), "onnx": session}
        took = {
            name: [1e6 * seconds for seconds in row]
            for name, row in paired(jobs, options.rounds, untimed=3, calls=3, pause=0.01).items()
        }
    middle = {name: statistics.median(times) for name, times in took.items()}
    rival = min(("compile", "onnx"), key=middle.__getitem__)
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(took[rival], took["ours"], strict=True)], n=4)
    least = min(min(took["compile"]), min(took["onnx"])) / min(took["ours"])
    verdict = "" if min(ratio, least) > 1 else "; does not win"
    chosen, quartiles = f"{ours.report.result}{verdict}", f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
    print(
        f"{label:24}{middle['eager']:9.0f}{middle['compile']:9.0f}{middle['onnx']:9.0f}{middle['ours']:9.1f}"
        f"{min(took['onnx']):11.0f}{min(took['ours']):11.1f}{quartiles:>24}{least:8.2f}   {chosen}",
        flush=True,
    )
    if show:
        print(str(ours.report), "\n")


def heading(kind: str) -> None:
    print(
        f"\n{kind:24}{'eager':>9}{'compile':>9}{'onnx':>9}{'ours':>9}{'least onnx':>11}{'least ours':>11}"
        f"{'rival/ours':>24}{'least':>8}   chosen"
    )


def table(kind: str, options: argparse.Namespace) -> None:
    heading(kind)
    for batch in BATCHES:
        for density in DENSITIES[kind]:
            net = network(kind, density)
            for name, x in inputs(batch, options.data_root).items():
                compare(f"batch {batch}, {density:.0%}, {name}", net, x, options)


class Block(nn.Module):
    """The MLP of a transformer, with the norm before it and the sum around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(768), nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


TOKENS: dict[str, Callable[[], nn.Module]] = {
    "768-3072-768": lambda: nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768)),
    "MLP": Block,
    "encoder layer": lambda: nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True),
}


def tokens(options: argparse.Namespace) -> None:
    """Parts of a transformer on 4 sequences of 32 tokens; all their matrices have the density, attention's too."""
    for name, make in TOKENS.items():
        heading(name)
        for density in (0.1, 0.05, 0.03, 0.01):
            torch.manual_seed(0)
            net = make().eval().requires_grad_(False)
            for weight in net.parameters():
                if weight.dim() == 2:
                    weight.mul_(torch.rand_like(weight) < density)
            compare(f"4 × 32 × 768, {density:.0%}", net, torch.randn(4, 32, 768), options)


def resnet(options: argparse.Namespace) -> None:
    """A ResNet-18 with a quarter of its filters, batch 16: shrunk, and made fast.

    "free": every convolution keeps filters of its own, so a residual stream has those that any of its writers keeps (58
    to 76 %). "aligned": the writers of a stream keep the same ones.
    """
    for aligned in (False, True):
        net, x = quarter(aligned), torch.randn(16, 3, 32, 32)
        small, wanted = tb.shrink(net, (x,)), net(x)
        networks = {"dense": net, "shrunk": small.model, "optimize_for_inference": optimize_for_inference(net, (x,))}
        for name, network in networks.items():
            error = float((network(x) - wanted).abs().max() / wanted.abs().max())
            assert error < 1e-5, f"{name} differs by {error}"
        jobs = {name: functools.partial(network, x) for name, network in networks.items()}
        times = paired(jobs, options.rounds, skip=0)
        before, after = small.report.parameters
        label = "aligned" if aligned else "free"
        print(f"\nResNet-18, 25 % of the filters ({label}), batch 16: {before:,} -> {after:,} parameters", flush=True)
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(times["dense"], seconds, strict=True)]
            print(
                f"  {name:28}{1e3 * statistics.median(seconds):8.1f} ms{statistics.median(ratios):8.2f} x   least "
                f"{1e3 * min(seconds):7.1f} ms{min(times['dense']) / min(seconds):8.2f} x"
            )


def quarter(aligned: bool) -> nn.Module:
    """ResNet-18 in eval, three of four filters zero, norms with shifts and statistics."""
    torch.manual_seed(0)
    net = ResNet(3, 10).eval()
    keep: dict[object, torch.Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            n = len(module.weight)
            key = (n, "stream") if aligned and not name.endswith("conv1") else name
            dead = keep.setdefault(key, torch.randperm(n)[n // 4 :])
            module.weight.data[dead] = 0
        elif isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def machine() -> str:
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["mlp", "convnet", "tokens", "resnet"])
    parser.add_argument("--data-root", type=Path, help="holds mnist/; without it normal inputs alone")
    options = parser.parse_args()
    import onnxruntime

    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    random.seed(0)
    print(
        f"{machine()}, {options.threads} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{options.rounds} rounds"
    )
    for kind in ("mlp", "convnet"):
        if options.only in (None, kind):
            table(kind, options)
    if options.only in (None, "tokens"):
        tokens(options)
    if options.only in (None, "resnet"):
        with torch.no_grad():
            resnet(options)


if __name__ == "__main__":
    main()
