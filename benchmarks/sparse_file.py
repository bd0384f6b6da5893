"""The sparse file beside the dense one: bytes against what they must be, and the time of saving and loading.

    python benchmarks/sparse_file.py [--rounds 7] [--weights 20000000]

The bound: the bytes of the kept weights and of everything stored dense, and n·H(kept/n)/8 bytes per Linear weight of n
entries, the entropy of its pattern if that is random. Times are paired, medians, and in the page cache: dense is
`safetensors.torch.save_file` and `load_file`, both sides end with the tensors of a model on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import torch_bregman as tb
from torch_bregman.export.load import load_sparse
from torch_bregman.export.save import save_sparse

MLPS = {"784-200-80-10": (784, 200, 80, 10), "784-1200-900-10": (784, 1200, 900, 10)}


def mlp(*widths: int) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def random_support(model: nn.Module, density: float) -> None:
    """Every weight alive with this probability, so that layers differ a little in their densities."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.where(torch.rand_like(module.weight) < density, module.weight, 0.0))


def bound(model: nn.Module, each: int) -> float:
    """Bytes that no code of this kind goes below on a random pattern."""
    total = 0.0
    for name, tensor in model.state_dict().items():
        n, kept = tensor.numel(), int(tensor.count_nonzero())
        if name.endswith("weight"):
            p = kept / n
            entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0
            total += kept * each + n * entropy / 8
        else:
            total += n * each
    return total


def sizes(folder: Path) -> None:
    print(f"{'network':16s} {'support':8s} {'dtype':9s} {'density':>8s} {'bytes':>9s} {'bound':>9s} {'ratio':>6s} "
          f"{'dense':>10s} {'share':>7s}")  # fmt: skip
    for name, widths in MLPS.items():
        for kind in ("random", "init"):
            for dtype in (None, torch.bfloat16):
                for density in (0.1, 0.05, 0.02, 0.01):
                    torch.manual_seed(0)
                    model = mlp(*widths)
                    if kind == "init":
                        tb.sparse_init_(model, density)
                    else:
                        random_support(model, density)
                    saved = save_sparse(model, folder / "net.safetensors", dtype=dtype)
                    least = bound(model, 2 if dtype else 4)
                    print(f"{name:16s} {kind:8s} {'bfloat16' if dtype else 'float32':9s} {saved.density:8.3%} "
                          f"{saved.bytes:9,} {least:9,.0f} {saved.bytes / least:6.3f} "
                          f"{saved.dense_bytes:10,} {saved.share:7.2%}")  # fmt: skip


def times(folder: Path, weights: int, rounds: int) -> None:
    side = round(math.sqrt(weights / 5))
    torch.manual_seed(0)
    model = mlp(*[side] * 6)
    count = sum(p.numel() for p in model.parameters())
    dense, sparse = folder / "dense.safetensors", folder / "sparse.safetensors"
    jobs: dict[str, Callable[[], object]] = {
        "dense save": lambda: safetensors.torch.save_file(model.state_dict(), dense),
        "sparse save": lambda: save_sparse(model, sparse),
        "dense load": lambda: model.load_state_dict(safetensors.torch.load_file(dense)),
        "sparse load": lambda: load_sparse(model, sparse),
    }
    for density in (0.1, 0.05, 0.01):
        tb.sparse_init_(model, density)
        seconds: dict[str, list[float]] = {job: [] for job in jobs}
        for round_ in range(rounds + 1):
            for job, call in jobs.items():
                start = time.perf_counter()
                call()
                if round_:
                    seconds[job].append(time.perf_counter() - start)
        share = sparse.stat().st_size / dense.stat().st_size
        print(f"{count / 1e6:.1f} M parameters, {density:.0%}, {share:.2%} of the bytes: ", end="")
        for act in ("save", "load"):
            a, b = seconds[f"dense {act}"], seconds[f"sparse {act}"]
            ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
            print(f"{act} {statistics.median(b) * 1e3:.0f} ms, dense {statistics.median(a) * 1e3:.0f} ms, "
                  f"sparse/dense {ratio:.2f}", end="; " if act == "save" else "\n")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", type=int, default=20_000_000)
    arguments = parser.parse_args()
    machine = platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, safetensors {safetensors.__version__}"
    print(f"{versions}, {machine}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        sizes(Path(folder))
        print()
        times(Path(folder), arguments.weights, arguments.rounds)


if __name__ == "__main__":
    main()
