"""The sparse convolution beside the dense one, part by part, and a training step of the paper's ConvNet.

    python benchmarks/sparse_conv.py [--rounds 10] [--batch 128] [--threads 2] [--step-only]

Paired, medians; the dense one in the faster of NCHW and channels_last. "of peak" is 2·batch·positions·live operations
over the time, as a share of what the dense convolution reaches in the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics

import torch
from common import Job, paired, parts
from torch import Tensor, nn
from torch.nn import functional as F

from torch_bregman.models import convnet
from torch_bregman.multilevel.conv import ConvPattern, max_pool2d, sparse_conv2d
from torch_bregman.multilevel.linear import Pattern, sparse_linear

SHAPES = [(64, 64, 5, 0, 12), (64, 64, 3, 1, 32), (256, 256, 3, 1, 8)]  # in, out, kernel, padding, size
DENSITIES = [0.1, 0.05, 0.02, 0.01]
Jobs = dict[str, Job]


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def measure(jobs: dict[str, Jobs], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, in random order."""
    seconds = paired({(kind, part): job for kind, some in jobs.items() for part, job in some.items()}, rounds)
    return {kind: {part: seconds[kind, part] for part in some} for kind, some in jobs.items()}


def compare(jobs: dict[str, Jobs], rounds: int) -> list[tuple[str, float, float, float]]:
    """(part, dense seconds, sparse seconds, their ratio) of each part: medians."""
    seconds = measure(jobs, rounds)
    sparse, found = seconds.pop("sparse"), []
    for part, times in sparse.items():
        dense = min((kind[part] for kind in seconds.values()), key=statistics.median)
        ratio = statistics.median(a / b for a, b in zip(dense, times, strict=True))
        found.append((part, statistics.median(dense), statistics.median(times), ratio))
    return found


def layer(c: int, out: int, k: int, padding: int, size: int, density: float, batch: int) -> dict[str, Jobs]:
    torch.manual_seed(0)
    weight = torch.randn(out, c, k, k) * (torch.rand(out, c, k, k) < density)
    pattern, bias = ConvPattern(weight), torch.zeros(out)
    x = torch.randn(batch, c, size, size)
    upstream = torch.randn_like(F.conv2d(x, weight, padding=padding))

    def dense(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, bias, padding=padding)

    last = torch.channels_last
    return {
        "NCHW": parts(dense, x, weight, upstream),
        "channels_last": parts(
            dense,
            x.contiguous(memory_format=last),
            weight.contiguous(memory_format=last),
            upstream.contiguous(memory_format=last),
        ),
        "sparse": parts(
            lambda x, w: sparse_conv2d(x, w, bias, pattern, padding=padding),
            batch_last(x),
            pattern.restrict(weight),
            batch_last(upstream),
        ),
    }


class SparseConvNet(nn.Module):
    """`convnet` on 1×28×28 with the live weights of all layers but the last as parameters."""

    def __init__(self, dense: nn.Sequential, first_dense: bool) -> None:
        super().__init__()
        one, two, hidden, last = (m for m in dense if isinstance(m, (nn.Conv2d, nn.Linear)))
        self.one, self.last = one if first_dense else None, last
        self.patterns = [ConvPattern(one.weight), ConvPattern(two.weight), Pattern(hidden.weight)]
        layers = [one, two, hidden]
        values = [p.restrict(m.weight) for p, m in zip(self.patterns, layers, strict=True)]
        self.values = nn.ParameterList(values)
        self.biases = nn.ParameterList([m.bias.detach().clone() for m in layers])

    def forward(self, x: Tensor) -> Tensor:
        one, two, hidden = zip(self.values, self.biases, self.patterns, strict=True)
        x = sparse_conv2d(x, *one) if self.one is None else self.one(x)
        x = max_pool2d(x, 2, relu=True)
        x = max_pool2d(sparse_conv2d(x, *two), 2, relu=True)
        return self.last(sparse_linear(x.flatten(1), *hidden).relu())


def steps(density: float, first: float, batch: int) -> tuple[dict[str, Jobs], float]:
    """Forward and backward of the ConvNet, and how far the two losses are from each other."""
    torch.manual_seed(0)
    net = convnet((1, 28, 28), 10)
    assert isinstance(net, nn.Sequential)
    for at, share in ((0, first), (3, density), (7, density)):
        weight = net[at].weight
        weight.data.mul_(torch.rand_like(weight) < share)
    x, labels = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    jobs: dict[str, Jobs] = {}
    losses = []

    def add(name: str, net: nn.Module, x: Tensor) -> None:
        parameters = [p for p in net.parameters() if p.requires_grad]

        def step() -> None:
            loss = F.cross_entropy(net(x), labels)
            torch.autograd.grad(loss, parameters, allow_unused=True)

        losses.append(F.cross_entropy(net(x), labels).item())
        jobs[name] = {"step": step}

    add("sparse", SparseConvNet(net, first_dense=False), x)
    add("first dense", SparseConvNet(net, first_dense=True), x)
    add("NCHW", net, x)
    copy = convnet((1, 28, 28), 10)
    copy.load_state_dict(net.state_dict())
    add("channels_last", copy.to(memory_format=torch.channels_last), x)
    return jobs, max(losses) - min(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="calls of each kind")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, help="torch's; where the cores are shared only 1 gives steady figures")
    parser.add_argument("--step-only", action="store_true", help="the ConvNet alone")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}")
    print("ConvNet 1x28x28, forward and backward, density of the first layer and of the large ones; ms, median (least)")
    for first in (0.2, 1.0):
        for density in (0.1, 0.03, 0.01):
            jobs, gap = steps(density, first, options.batch)
            assert gap < 1e-4, gap
            seconds = {kind: job["step"] for kind, job in measure(jobs, options.rounds).items()}
            dense = min(seconds["NCHW"], seconds["channels_last"], key=statistics.median)
            for kind, times in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(dense, times, strict=True))
                print(
                    f"{first:5.0%}{density:5.0%}  {kind:14}{statistics.median(times) * 1e3:8.1f}"
                    f" ({min(times) * 1e3:.1f}){ratio:8.2f}x"
                )
    if options.step_only:
        return
    print(f"{'layer':24}{'density':>9}  {'':12}{'dense ms':>9}{'sparse ms':>10}{'faster':>8}{'of peak':>9}")
    for c, out, k, padding, size in SHAPES:
        for density in DENSITIES:
            jobs = layer(c, out, k, padding, size, density, options.batch)
            for part, dense, sparse, ratio in compare(jobs, options.rounds):
                name = f"{c}->{out} {k}x{k} on {size}x{size}"
                print(
                    f"{name:24}{density:9.0%}  {part:12}{dense * 1e3:9.3f}{sparse * 1e3:10.3f}{ratio:8.1f}"
                    f"{ratio * density:9.0%}"
                )


if __name__ == "__main__":
    main()
